"""`Combined` equals its only part, and two prompts equal one of the concatenated values."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from tiny import CLASSES, TEMPLATES, batch_of
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.core.join_prompts import join_prompts
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import (
    IDPG,
    MPT,
    Combined,
    ContextAware,
    DePT,
    FullFineTuning,
    LatePromptTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
)
from lightning_softprompt.methods.optimizers import trainable_parameters

FAMILIES = ("llama", "t5", "bert")
EXACT = {"atol": 1e-12, "rtol": 1e-12}
LABELS = (0, 1, 1, 0)
PARTS = {
    "prompt_tuning": partial(PromptTuning, length=3),
    "prefix_tuning": partial(PrefixTuning, length=2, width=8),
    "dept": partial(DePT, length=2, rank=2, max_tokens=5),
    "idpg": partial(IDPG, length=2, bottleneck=4),
    "mpt": partial(MPT, length=2),
    "lora": partial(LoRA, rank=2),
}


def attach(module, backbone):
    """Attach a method in float64, with its classes."""
    module.attach(backbone, seed=0)
    return module.double().eval()


def compute_loss(module, backbone, template=TEMPLATES["front"]):
    """Return the loss of a batch after its backward pass."""
    batch = batch_of(backbone.codec, template, labels=LABELS)
    loss = module.step(batch)["loss"]
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", PARTS)
def test_one_part_alone_has_its_loss_and_gradients(name, family, load):
    alone_backbone, backbone = load(family).double(), load(family).double()
    alone = attach(PARTS[name](classes=CLASSES), alone_backbone)
    combined = attach(Combined(parts=[PARTS[name]()], classes=CLASSES), backbone)
    assert torch.equal(compute_loss(combined, backbone), compute_loss(alone, alone_backbone))
    names = {key: p for key, p in alone.named_parameters(remove_duplicate=False) if not key.startswith("backbone.")}
    gradients = {key: parameter.grad for key, parameter in names.items()}
    prefix = f"parts.{type(combined.parts.methods[0]).__name__}."
    assert gradients
    for key, gradient in gradients.items():
        assert torch.equal(combined.get_parameter(prefix + key).grad, gradient), key


@pytest.mark.parametrize("lengths", [(3, 2), ([1, 2], [2, 1]), (2, [1, 3])], ids=str)
def test_two_prompts_equal_one_prompt_of_the_concatenated_values(lengths, family, load):
    backbone = load(family).double()
    template = "{soft}{text}{soft} it was {target}"
    first, second = (PromptTuning(length=length) for length in lengths)
    combined = attach(Combined(parts=[first, second]), backbone)
    blocks = [[*part.blocks, *[0] * (2 - len(part.blocks))] for part in (first, second)]
    totals = [sum(pair) for pair in zip(*blocks, strict=True)]
    one = attach(PromptTuning(length=[total for total in totals if total]), backbone)
    values = [part.tokens.detach().split(sizes) for part, sizes in zip((first, second), blocks, strict=True)]
    with torch.no_grad():
        one.tokens.copy_(torch.cat([tokens for slot in zip(*values, strict=True) for tokens in slot]))
    assert_close(compute_loss(combined, backbone, template), compute_loss(one, backbone, template), **EXACT)
    gradients = [part.tokens.grad.split(sizes) for part, sizes in zip((first, second), blocks, strict=True)]
    expected = torch.cat([tokens for slot in zip(*gradients, strict=True) for tokens in slot])
    assert_close(one.tokens.grad, expected, **EXACT)


def test_two_prefixes_equal_one_prefix_of_the_concatenated_values(family, load):
    backbone = load(family).double()
    first, second = (PrefixTuning(length=length, width=None) for length in (2, 3))
    combined = attach(Combined(parts=[first, second]), backbone)
    batch = batch_of(backbone.codec, labels=LABELS)
    prompts = [part.prompt(batch) for part in (first, second)]
    for kind, layers in combined.prompt(batch).kv.items():
        for layer, (key, value) in layers.items():
            parts = [prompt.kv[kind][layer] for prompt in prompts]
            assert torch.equal(key, torch.cat([part_key for part_key, _ in parts], 2))
            assert torch.equal(value, torch.cat([part_value for _, part_value in parts], 2))


def test_each_part_has_its_learning_rate(load):
    def rates(**common):
        parts = [PromptTuning(length=2), PromptTuning(length=2, lr=0.3), MPT(length=2, factors_lr=0.4), LoRA(rank=2)]
        module = Combined(parts=parts, **common)
        module.attach(load("llama"))
        optimizer = module.optimizer_factory.build(module.trainable_groups(), None)
        return {group["name"]: group["lr"] for group in optimizer.param_groups}

    expected = {"PromptTuning": 0.005, "PromptTuning_2": 0.3, "MPT/prompt": 0.005, "MPT/factors": 0.4, "LoRA": 1e-3}
    assert rates() == expected
    assert rates(lr=0.1) == expected | {"PromptTuning": 0.1, "MPT/prompt": 0.1, "LoRA": 0.1}


def test_penalties_projections_and_dropout_of_the_parts_are_applied(load):
    backbone = load("llama")
    part = ContextAware()
    module = Combined(parts=[part, PromptTuning(length=2, prompt_dropout=0.5)], classes=CLASSES)
    module.attach(backbone, seed=0)
    assert module.training_loss.weights == {"context": 1.0}
    batch = batch_of(backbone.codec, labels=LABELS)
    assert "penalty/context" in module.step(batch)
    tokens = module.eval().prompt(batch).tokens
    dropped = module.train().prompt(batch).tokens
    assert torch.equal(dropped[:, :-2], tokens[:, :-2])
    assert not torch.equal(dropped[:, -2:], tokens[:, -2:])
    projected = []
    part.project = lambda: projected.append(True)
    module.project()
    assert projected == [True]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Combined(), "requires parts"),
        (lambda: Combined(parts=[LoRA(), FullFineTuning()]), "LoRA and FullFineTuning both change weights"),
        (
            lambda: Combined(parts=[PromptTuning(warmup=0.1)]),
            "PromptTuning is a part .* cannot set warmup",
        ),
    ],
)
def test_parts_that_cannot_be_combined_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([DePT(length=2, rank=2, max_tokens=5), DePT(length=2, rank=2, max_tokens=5)], "both shift the embeddings"),
        ([PrefixTuning(length=2), PTuningV2(length=2, layers=[-1])], "self keys in different layers"),
        ([PromptTuning(length=2), LatePromptTuning(length=2, generator="free")], "cannot be joined with PromptTuning"),
    ],
    ids=["shifts", "layers", "middle layer"],
)
def test_prompts_that_cannot_be_joined_are_refused(parts, message, load):
    backbone = load("llama")
    module = Combined(parts=deepcopy(parts))
    module.attach(backbone)
    with pytest.raises(ValueError, match=message):
        module(batch_of(backbone.codec))


def test_masks_of_rows_are_joined():
    masked = SoftPrompt(
        tokens=torch.ones(2, 2, 4),
        token_mask=torch.tensor([[True, False], [True, True]]),
        kv={"self": {0: (torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4))}},
        kv_mask={"self": torch.tensor([[True, True], [False, True]])},
    )
    shared = replace(masked, tokens=torch.zeros(1, 1, 4), token_mask=None, kv_mask={})
    joined = join_prompts({"first": shared, "second": masked}, rows=2)
    assert joined.tokens.shape == (2, 3, 4)
    assert joined.token_mask.tolist() == [[True, True, False], [True, True, True]]
    assert joined.kv_mask["self"].tolist() == [[True, True, True, True], [True, True, False, True]]


def test_rows_of_several_tasks_have_the_prompt_of_their_task_in_each_part(load):
    backbone = load("llama")
    tasks = {"first": CLASSES, "second": CLASSES}
    module = Combined(parts=[MPT(length=2), PromptTuning(length=1)], classes_by_task=tasks)
    module.attach(backbone, seed=0)
    batch = replace(batch_of(backbone.codec, labels=LABELS), task_ids=torch.tensor([0, 1, 1, 0]))
    with torch.no_grad():
        for parameter in trainable_parameters(module).values():
            parameter.add_(torch.randn_like(parameter))
        joined, expected = module.prompt(batch).tokens, module.parts["MPT"].prompt(batch).tokens
    assert torch.equal(joined[:, :2], expected)
    assert not torch.equal(joined[0], joined[1])


def test_a_resumed_training_equals_an_uninterrupted_one(load, tmp_path):
    spec = load("llama").spec

    def train(steps, path=None):
        parts = [PromptTuning(length=2, lr=0.1), LoRA(rank=2)]
        module = Combined(parts=parts, classes=CLASSES, backbone=spec)
        module.configure_model()
        batches = DataLoader([batch_of(module.loaded.codec, labels=LABELS)] * 4, batch_size=None)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, batches, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.state_dict()

    start = train(2)
    resumed, expected = train(4, tmp_path / "2.ckpt"), train(4)
    assert set(resumed) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    assert not torch.equal(start["parts.PromptTuning.tokens"], expected["parts.PromptTuning.tokens"])


def test_text_before_a_prompt_is_not_cached_if_weights_change(load, monkeypatch):
    losses, gradients = [], []
    for least in (1, 10**6):  # tokens from which the text before a prompt runs separately
        monkeypatch.setattr("lightning_softprompt.backbones.execution.context_cache.MIN_FROZEN_TOKENS", least)
        backbone = load("llama").double()
        module = attach(Combined(parts=[PARTS["prompt_tuning"](), PARTS["lora"]()]), backbone)
        for step in range(2):
            losses.append(compute_loss(module, backbone, TEMPLATES["end"]))
            with torch.no_grad():
                for number, parameter in enumerate(trainable_parameters(module).values()):
                    parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()) + number + step).view_as(parameter))
        gradients.append([parameter.grad for parameter in trainable_parameters(module).values()])
    assert_close(losses[:2], losses[2:], **EXACT)
    assert_close(gradients[0], gradients[1], **EXACT)
