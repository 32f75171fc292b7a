"""Quantised backbones against a plain model with the same weights, taken apart here by other code."""

import json

import pytest
import tiny
import torch
from bitsandbytes.nn import Params4bit
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lightning_softprompt.backbones.kernels import quantized_linear
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity, check_backbone
from lightning_softprompt.cli.commands import doctor
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.training.memory_measurement import Workload
from lightning_softprompt.training.memory_plan import plan

FAMILIES = ("llama", "t5", "bart", "bert")
KINDS = tuple(quantized_linear.SCHEMES)
AUTO = {"t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}
NF4 = (  # Dettmers et al. 2023 (arXiv 2305.14314), appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
kinds = pytest.mark.parametrize("kind", KINDS)


def by_rows(weight):
    """A torchao weight, row by row."""
    return torch.stack([float(scale) * row.float() for row, scale in zip(weight.qdata, weight.scale, strict=True)])


def by_rows_of_127(weight):
    """A weight of bitsandbytes in 8 bits: each row's largest number is 127."""
    return torch.stack([float(most) * row.float() / 127 for row, most in zip(weight.data, weight.SCB, strict=True)])


def by_code(weight):
    """A weight of bitsandbytes in 4 bits, looked up number by number: two in a byte, 64 to a scale."""
    state = weight.quant_state
    halves = [half for byte in weight.data.flatten().tolist() for half in (byte >> 4, byte & 15)]
    values = [NF4[half] * float(state.absmax[i // state.blocksize]) for i, half in enumerate(halves)]
    return torch.tensor(values[: state.shape.numel()]).view(state.shape)


LOOPS = dict(zip(KINDS, (by_rows, by_rows_of_127, by_code), strict=True))


@pytest.fixture
def plain(family, kind, load, tiny_folder):
    """A quantised backbone, and one in float32 whose weights are those, taken apart."""
    ours, same = load(family, quantization=kind), load(family, linear_backend="plain")
    for name, module in ours.model.named_modules():
        if f"{name}.weight" in ours.quantized:
            target = same.model.get_submodule(name)
            target.weight.data.copy_(LOOPS[kind](module.weight))
    return ours, same


def prompt_of(backbone, requires_grad=True):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(1, 4, backbone.hidden_size, generator=draw).requires_grad_(requires_grad)


def loss_and_gradient(backbone):
    tokens = prompt_of(backbone)
    batch = tiny.batch_of(backbone.codec)
    loss = backbone.cross_entropy(batch, SoftPrompt(tokens=tokens)).sum()
    return loss.detach(), *torch.autograd.grad(loss, tokens)


@kinds
def test_loss_and_gradient_of_the_prompt_are_those_of_the_same_weights_in_float32(plain):
    ours, same = plain
    assert ours.quantized
    for got, wanted in zip(loss_and_gradient(ours), loss_and_gradient(same), strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@kinds
def test_weights_are_held_in_few_bits_and_are_near_what_they_were_made_of(plain, kind, load, family):
    ours, before = plain[0], load(family, linear_backend="plain")
    off = 0.153 if kind == "bitsandbytes-nf4" else 0.55 / 127  # half of the widest gap, after float16
    for name, apart in ours.quantized.items():
        was, now = before.model.get_parameter(name), apart.weight(torch.float32)
        most = was.abs().max() if kind == "bitsandbytes-nf4" else was.abs().amax(1, keepdim=True)
        assert ((now - was).abs() <= off * most).all()
        assert not torch.equal(now, was)


@pytest.mark.parametrize("shape", [(32, 32), (48, 96), (3, 66), (4, 64), (96, 128)])
def test_weights_of_any_width_come_back(shape):
    given = torch.randn(shape)
    layer = torch.nn.Module()
    layer.weight = Params4bit(given, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    apart = quantized_linear.DequantLinear(layer, quantized_linear.SCHEMES["bitsandbytes-nf4"]).weight(torch.float32)
    assert_close(apart, by_code(layer.weight))
    assert (apart - given).abs().max() <= 0.153 * given.abs().max()


@kinds
def test_a_step_keeps_no_weight_in_full(kind, load):
    backbone = load("llama", quantization=kind)
    shapes = {tuple(apart.weight(torch.float32).shape) for apart in backbone.quantized.values()}
    batch, tokens, kept = tiny.batch_of(backbone.codec), prompt_of(backbone), []
    backbone(batch, SoftPrompt(tokens=tokens))  # tries out the paths

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(batch, SoftPrompt(tokens=tokens))
    assert kept
    assert not [shape for shape in kept if shape in shapes or shape[::-1] in shapes]


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packed_rows_are_tried_out_and_taken(kind, dtype, load):
    backbone, padded = (load("llama", quantization=kind, dtype=dtype, packed=packed) for packed in (True, False))
    batch, prompt = tiny.batch_of(backbone.codec), SoftPrompt(tokens=prompt_of(backbone, requires_grad=False))
    got, wanted = (tiny.real(batch, each(batch, prompt)).float() for each in (backbone, padded))
    assert backbone.execution_description.startswith("packed batches")
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@kinds
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_what_is_generated_is_what_the_same_weights_say(plain):
    ours, same = plain
    batch, prompt = tiny.batch_of(ours.codec), SoftPrompt(tokens=prompt_of(ours, requires_grad=False))
    got, wanted = (each.generate(batch, prompt, max_new_tokens=6) for each in (ours, same))
    assert torch.equal(got, wanted)


@kinds
def test_a_prompt_belongs_to_the_weights_as_they_are_held_unless_it_is_said_to_be_another(kind, load, tiny_folder):
    full, held = load("llama"), load("llama", quantization=kind)
    assert load("llama", quantization=kind).fingerprint() == held.fingerprint() != full.fingerprint()
    with pytest.raises(ValueError, match=rf"--backbone.accept_prompts_of {full.fingerprint()}"):
        check_backbone(backbone_identity(full), held, "a.ckpt")
    with pytest.raises(ValueError, match=f"quantized to {kind}"):
        check_backbone(backbone_identity(held), full, "a.ckpt")
    check_backbone(backbone_identity(held), held, "a.ckpt")
    other = load("llama", quantization=kind, accept_prompts_of=full.fingerprint())
    check_backbone(backbone_identity(full), other, "a.ckpt")
    check_backbone(backbone_identity(other), held, "a.ckpt")
    with pytest.raises(ValueError, match="only works with the backbone it was trained on"):
        check_backbone(backbone_identity(load("llama", seed=1)), other, "a.ckpt")


@kinds
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"linear_backend": "prepacked"}, "linear_backend prepacked"),
        ({"linear_backend": "bf16"}, "linear_backend bf16"),
        ({"compiled": True}, "compiled"),
    ],
)
def test_what_quantised_weights_cannot_have_is_refused(kind, wrong, told, load):
    with pytest.raises(ValueError, match=told):
        load("llama", quantization=kind, **wrong)


def test_weights_that_are_to_change_are_not_quantised(load):
    with pytest.raises(ValueError, match=r"remove backbone\.quantization"):
        load("llama", quantization="torchao-int8").unfreeze()


@kinds
def test_a_missing_package_is_named(kind, load, monkeypatch):
    monkeypatch.setattr(quantized_linear, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"requires the package \w+; pip install 'lightning-softprompt\[quantized\]'"):
        load("llama", quantization=kind)


def test_a_model_without_linear_layers_is_refused(load):
    with pytest.raises(ValueError, match="no plain linear layers"):
        load("gpt2", quantization="torchao-int8")


def test_layers_that_are_computed_again_give_the_same_gradient(load):
    kept, again = (load("llama", quantization="bitsandbytes-nf4", checkpointing=how) for how in (False, True))
    for got, wanted in zip(loss_and_gradient(again), loss_and_gradient(kept), strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_backbone_that_comes_quantised_is_refused(tmp_path):
    folder = tiny.save("llama", tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is already quantized by another scheme.* set backbone\.quantization"):
        load_backbone(BackboneSpec(name=str(folder)))


def bytes_of(tensor):
    state = getattr(tensor, "quant_state", None)
    held = [getattr(tensor, name, None) for name in ("qdata", "scale", "SCB")] + [getattr(state, "absmax", None)]
    held += [tensor.data] if held[0] is None else []
    return sum(part.nbytes for part in held if part is not None)


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_knows_what_quantised_weights_take(kind, dtype, load):
    backbone = load("llama", quantization=kind, dtype=dtype)
    found = plan(PromptTuning(length=3, backbone=backbone.spec), backbone.spec, Workload(rows=2, tokens=30))
    assert found.training["frozen weights"] == sum(map(bytes_of, backbone.model.parameters()))
    largest = max(apart.weight(getattr(torch, dtype)).nbytes for apart in backbone.quantized.values())
    assert found.training["dequantized matrix"] == largest
    with pytest.raises(ValueError, match="cannot be sharded"):
        plan(PromptTuning(backbone=backbone.spec), backbone.spec, Workload(2, 30, devices=2, sharded=True))


def test_the_doctor_says_how_weights_are_held(tiny_folder):
    found = {finding.name: finding for finding in doctor.speed(str(tiny_folder("llama")), "bitsandbytes-nf4")}
    assert found["rows"].text.startswith("packed batches")
    assert "14 matrices quantized to bitsandbytes-nf4" in found["weights"].text
    assert doctor.QUANTIZATIONS == KINDS
