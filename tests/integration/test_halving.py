"""Steps that run out of memory: the same steps, their rows in parts. Memory is told to be short by raising."""

import logging
from contextlib import contextmanager

import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from row_files import write_rows
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.callbacks.recovery.oom_retry import Halving, RetryingStep
from lightning_softprompt.cli.app import main
from lightning_softprompt.methods import PrefixTuning, PromptTuning, PTuningV2, SMoP
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.prompts.kv_prefix import NormalKeysValues
from lightning_softprompt.readouts.class_head import ClassHead
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

FAMILIES = ("llama", "t5", "bert")
LABELS = torch.tensor([0, 1, 1, 0])
KINDS = {
    "prompt tuning, dropout": (PromptTuning, {"length": 3, "prompt_dropout": 0.5}),
    "mean over tokens": (PromptTuning, {"length": 3, "objective": LanguageModeling(average="tokens")}),
    "keys and values": (PrefixTuning, {"length": 2, "width": 8, "prompt_dropout": 0.3}),
    "a head": (PTuningV2, {"length": 2, "init": NormalKeysValues(0.5), "readout": ClassHead}),
    "a router": (SMoP, {"length": 2, "experts": 2, "penalty_weights": {"balance": 0.1}}),
}


@contextmanager
def memory_for(backbone, rows, backward=False):
    """A backbone that runs out of memory at more rows, when it runs or in its backward pass."""
    before = {name: getattr(backbone, name) for name in ("states", "hidden_states")}
    counts = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("tried to allocate more than there is")

    def short(name):
        def run(batch, *given, **named):
            counts.append(len(batch))
            if len(batch) > rows and not backward:
                raise torch.OutOfMemoryError("tried to allocate more than there is")
            found = before[name](batch, *given, **named)
            if len(batch) <= rows:
                return found
            return States(Fails.apply(found.hidden), found.logits) if name == "states" else Fails.apply(found)

        return run

    type_of = type(backbone)
    patched = type("Short", (type_of,), {name: staticmethod(short(name)) for name in before})
    backbone.__class__ = patched
    try:
        yield counts
    finally:
        backbone.__class__ = type_of


def made(backbone, kind, **more):
    cls, arguments = KINDS[kind]
    module = cls(**{"classes": tiny.CLASSES, **arguments, **more, "backbone": backbone.spec})
    module.attach(backbone, seed=1)
    return module.train()


def taken(module, batch):
    """Loss and gradients of a step, and the random number that comes after it."""
    torch.manual_seed(5)
    module.zero_grad()
    logs = module.step(batch, 0.0)
    logs["loss"].backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    return logs["loss"].detach(), [torch.zeros(()) if g is None else g.clone() for g in gradients], torch.rand(3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_parts_is_the_step(kind, family, backward, load):
    backbone = load(family)
    module = made(backbone, kind)
    batch = tiny.batch_of(backbone.codec, labels=LABELS)
    whole = taken(module, batch)
    halving = Halving()
    module.step = RetryingStep(halving, module)
    with memory_for(backbone, 1, backward) as counts:
        parted = taken(module, batch)
    assert halving.parts == 4
    assert max(counts) == 4
    for got, wanted in zip(parted, whole, strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(parted[2], whole[2])
    assert "states" not in vars(backbone)


def test_later_steps_keep_the_parts(load):
    backbone = load("llama")
    module = made(backbone, "prompt tuning, dropout")
    batch = tiny.batch_of(backbone.codec, labels=LABELS)
    halving = Halving()
    module.step = RetryingStep(halving, module)
    with memory_for(backbone, 2) as counts:
        taken(module, batch)
        counts.clear()
        taken(module, batch)
    assert max(counts) == 2
    again = Halving()
    again.load_state_dict(halving.state_dict())
    assert again.parts == 2


def test_one_row_that_does_not_fit_stops_the_run_and_says_what_helps(load):
    backbone = load("llama")
    module = made(backbone, "prompt tuning, dropout")
    module.step = RetryingStep(Halving(), module)
    with memory_for(backbone, 0), pytest.raises(torch.OutOfMemoryError, match=r"single row .* data\.max_tokens"):
        taken(module, tiny.batch_of(backbone.codec, labels=LABELS))


def fitted(module, backbone, rows, callbacks=(), **options):
    batches = DataLoader([tiny.batch_of(backbone.codec, labels=LABELS)] * 4, batch_size=None)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    torch.manual_seed(7)
    with memory_for(backbone, rows):
        trainer.fit(module, batches)
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "more"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_training_in_parts_is_the_training(count, options, load, caplog):
    ends = []
    for rows, callbacks in ((4, []), (1, [Halving()])):
        torch.manual_seed(0)
        backbone = load("llama")
        module = PromptTuning(length=3, prompt_dropout=0.5, classes=tiny.CLASSES, backbone=backbone.spec)
        module = module if count == 1 else Replicas(module, ReplicaSpec(count))
        methods = getattr(module, "replicas", [module])
        for k, method in enumerate(methods):
            method.attach(backbone, k)
        with caplog.at_level(logging.WARNING):
            ends.append(fitted(module, backbone, rows, callbacks, **options))
        assert all("step" not in vars(method) for method in methods)
    assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)
    assert "splitting the 4 rows of each step into 2 parts" in caplog.text
    assert "splitting the 4 rows of each step into 4 parts" in caplog.text


def test_half_precision_scales_its_losses_within_the_step(load):
    backbone = load("llama")
    module = made(backbone, "mean over tokens")
    batch = tiny.batch_of(backbone.codec, labels=LABELS)
    plain = taken(module, batch)
    module.step = RetryingStep(Halving(), module, torch.amp.GradScaler("cpu", init_scale=1024.0))
    for got, wanted in zip(taken(module, batch)[:2], plain[:2], strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_option_is_there(tmp_path, rows, tiny_folder):
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    ends = []
    for option in ("true", "false"):
        words = [
            "fit", "--model=PromptTuning", "--model.length=3", f"--backbone.name={tiny_folder('llama')}",
            "--data=ClassificationDataModule", f"--data.path={tmp_path}", "--data.template={soft}{text} it is{target}",
            '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--data.batch_size=2",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=3",
            f"--run.folder={tmp_path / 'runs'}", f"--run.halve_on_oom={option}", "--run.wandb=disabled",
        ]  # fmt: skip
        assert main(words) == 0
        kept = torch.load(last_folder() / "checkpoints" / "last.ckpt", weights_only=True)
        assert ("Halving" in kept["callbacks"]) == (option == "true")
        ends.append(kept["state_dict"]["tokens"])
    assert_close(*ends, rtol=1e-5, atol=1e-6)
