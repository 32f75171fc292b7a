"""Quantized backbones compared with a plain model whose weights a loop dequantizes."""

import json

import pytest
import tiny
import torch
from bitsandbytes.nn import Params4bit
from torch.testing import assert_close

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
NF4 = (  # Dettmers et al. 2023 (arXiv 2305.14314), appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
kinds = pytest.mark.parametrize("kind", KINDS)


def dequantize_torchao(weight):
    """Return a weight of torchao: each row has a scale."""
    rows = zip(weight.qdata, weight.scale, strict=True)
    return torch.stack([float(scale) * row.float() for row, scale in rows])


def dequantize_int8(weight):
    """Return a weight of bitsandbytes in 8 bits: the largest magnitude of a row is stored as 127."""
    rows = zip(weight.data, weight.SCB, strict=True)
    return torch.stack([float(largest) * row.float() / 127 for row, largest in rows])


def dequantize_nf4(weight):
    """Return a weight of bitsandbytes in 4 bits: two numbers in a byte, and 64 numbers with one scale."""
    state = weight.quant_state
    codes = []
    for byte in weight.data.flatten().tolist():
        codes += [byte >> 4, byte & 15]
    scales = [float(state.absmax[index // state.blocksize]) for index in range(len(codes))]
    values = [NF4[code] * scale for code, scale in zip(codes, scales, strict=True)]
    return torch.tensor(values[: state.shape.numel()]).view(state.shape)


LOOPS = dict(zip(KINDS, (dequantize_torchao, dequantize_int8, dequantize_nf4), strict=True))


@pytest.fixture
def pair(family, kind, load):
    """A quantized backbone, and one in float32 with the dequantized weights."""
    quantized, plain = load(family, quantization=kind), load(family, linear_backend="plain")
    for name, module in quantized.model.named_modules():
        if f"{name}.weight" in quantized.quantized:
            target = plain.model.get_submodule(name)
            target.weight.data.copy_(LOOPS[kind](module.weight))
    return quantized, plain


def prompt_of(backbone, requires_grad=True):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 4, backbone.hidden_size, generator=generator).requires_grad_(requires_grad)


def loss_and_gradient(backbone):
    tokens = prompt_of(backbone)
    batch = tiny.batch_of(backbone.codec)
    loss = backbone.cross_entropy(batch, SoftPrompt(tokens=tokens)).sum()
    return loss.detach(), *torch.autograd.grad(loss, tokens)


@kinds
def test_loss_and_gradient_of_the_prompt_equal_those_with_the_dequantized_weights(pair):
    quantized, plain = pair
    assert quantized.quantized
    assert_close(loss_and_gradient(quantized), loss_and_gradient(plain), rtol=1e-5, atol=1e-5)


@kinds
def test_quantized_weights_are_near_the_original_weights(kind, load, family):
    quantized, original = load(family, quantization=kind), load(family, linear_backend="plain")
    tolerance = 0.153 if kind == "bitsandbytes-nf4" else 0.55 / 127  # half of the widest gap, after float16
    for name, layer in quantized.quantized.items():
        before, after = original.model.get_parameter(name), layer.weight(torch.float32)
        largest = before.abs().max() if kind == "bitsandbytes-nf4" else before.abs().amax(1, keepdim=True)
        assert ((after - before).abs() <= tolerance * largest).all()
        assert not torch.equal(after, before)


@pytest.mark.parametrize("shape", [(32, 32), (48, 96), (3, 66), (4, 64), (96, 128)])
def test_nf4_weights_of_any_width_are_dequantized(shape):
    original = torch.randn(shape)
    layer = torch.nn.Module()
    layer.weight = Params4bit(original, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    scheme = quantized_linear.SCHEMES["bitsandbytes-nf4"]
    weight = quantized_linear.DequantLinear(layer, scheme).weight(torch.float32)
    assert_close(weight, dequantize_nf4(layer.weight))
    assert (weight - original).abs().max() <= 0.153 * original.abs().max()


@kinds
def test_a_step_saves_no_dequantized_weight(kind, load):
    backbone = load("llama", quantization=kind)
    weight_shapes = {tuple(layer.weight(torch.float32).shape) for layer in backbone.quantized.values()}
    batch, tokens, saved_shapes = tiny.batch_of(backbone.codec), prompt_of(backbone), []
    backbone(batch, SoftPrompt(tokens=tokens))  # selects the execution path

    def save(tensor):
        saved_shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        backbone(batch, SoftPrompt(tokens=tokens))
    assert saved_shapes
    assert not [shape for shape in saved_shapes if shape in weight_shapes or shape[::-1] in weight_shapes]


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packed_rows_are_selected_and_equal_padded_rows(kind, dtype, load):
    backbone, padded = (load("llama", quantization=kind, dtype=dtype, packed=packed) for packed in (True, False))
    batch, prompt = tiny.batch_of(backbone.codec), SoftPrompt(tokens=prompt_of(backbone, requires_grad=False))
    logits, expected = (tiny.real(batch, each(batch, prompt)).float() for each in (backbone, padded))
    assert backbone.execution_description.startswith("packed batches")
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@kinds
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_generation_equals_generation_with_the_dequantized_weights(pair):
    quantized, plain = pair
    batch, prompt = tiny.batch_of(plain.codec), SoftPrompt(tokens=prompt_of(plain, requires_grad=False))
    output, expected = (each.generate(batch, prompt, max_new_tokens=6) for each in (quantized, plain))
    assert torch.equal(output, expected)


@kinds
def test_a_prompt_requires_the_same_quantization_unless_an_option_accepts_it(kind, load):
    full, quantized = load("llama"), load("llama", quantization=kind)
    assert load("llama", quantization=kind).fingerprint() == quantized.fingerprint()
    assert quantized.fingerprint() != full.fingerprint()
    with pytest.raises(ValueError, match=rf"--backbone.accept_prompts_of {full.fingerprint()}"):
        check_backbone(backbone_identity(full), quantized, "a.ckpt")
    with pytest.raises(ValueError, match=f"quantized to {kind}"):
        check_backbone(backbone_identity(quantized), full, "a.ckpt")
    check_backbone(backbone_identity(quantized), quantized, "a.ckpt")
    other = load("llama", quantization=kind, accept_prompts_of=full.fingerprint())
    check_backbone(backbone_identity(full), other, "a.ckpt")
    check_backbone(backbone_identity(other), quantized, "a.ckpt")
    with pytest.raises(ValueError, match="only works with the backbone it was trained on"):
        check_backbone(backbone_identity(load("llama", seed=1)), other, "a.ckpt")


@kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_backend": "prepacked"}, "linear_backend prepacked"),
        ({"linear_backend": "bf16"}, "linear_backend bf16"),
        ({"compiled": True}, "compiled"),
    ],
)
def test_options_that_quantized_weights_do_not_support_are_rejected(kind, options, message, load):
    with pytest.raises(ValueError, match=message):
        load("llama", quantization=kind, **options)


def test_quantized_weights_cannot_be_trained(load):
    with pytest.raises(ValueError, match=r"remove backbone\.quantization"):
        load("llama", quantization="torchao-int8").unfreeze()


@kinds
def test_a_missing_package_is_named(kind, load, monkeypatch):
    monkeypatch.setattr(quantized_linear, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"requires the package \w+; pip install 'lightning-softprompt\[quantized\]'"):
        load("llama", quantization=kind)


def test_a_model_without_linear_layers_is_rejected(load):
    with pytest.raises(ValueError, match="no plain linear layers"):
        load("gpt2", quantization="torchao-int8")


def test_activation_checkpointing_gives_the_same_gradient(load):
    plain = load("llama", quantization="bitsandbytes-nf4")
    checkpointed = load("llama", quantization="bitsandbytes-nf4", checkpointing=True)
    assert_close(loss_and_gradient(checkpointed), loss_and_gradient(plain), rtol=1e-5, atol=1e-6)


def test_a_backbone_that_is_already_quantized_is_rejected(tmp_path):
    folder = tiny.save("llama", tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is already quantized by another scheme.* set backbone\.quantization"):
        load_backbone(BackboneSpec(name=str(folder)))


def bytes_of(tensor):
    """Return the bytes of a parameter with its scales."""
    parts = [getattr(tensor, name, None) for name in ("qdata", "scale", "SCB")]
    parts.append(getattr(getattr(tensor, "quant_state", None), "absmax", None))
    if not hasattr(tensor, "qdata"):
        parts.append(tensor.data)
    return sum(part.nbytes for part in parts if part is not None)


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_plan_counts_quantized_weights(kind, dtype, load):
    backbone = load("llama", quantization=kind, dtype=dtype)
    estimate = plan(PromptTuning(length=3, backbone=backbone.spec), backbone.spec, Workload(rows=2, tokens=30))
    assert estimate.training["frozen weights"] == sum(map(bytes_of, backbone.model.parameters()))
    largest = max(layer.weight(getattr(torch, dtype)).nbytes for layer in backbone.quantized.values())
    assert estimate.training["dequantized matrix"] == largest
    with pytest.raises(ValueError, match="cannot be sharded"):
        plan(PromptTuning(backbone=backbone.spec), backbone.spec, Workload(2, 30, devices=2, sharded=True))


def test_the_doctor_reports_the_quantization(tiny_folder):
    findings = {finding.name: finding for finding in doctor.speed(str(tiny_folder("llama")), "bitsandbytes-nf4")}
    assert findings["rows"].text.startswith("packed batches")
    assert "14 matrices quantized to bitsandbytes-nf4" in findings["weights"].text
    assert doctor.QUANTIZATIONS == KINDS
