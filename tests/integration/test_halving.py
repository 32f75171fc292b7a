"""Steps that run out of memory are repeated with their rows in parts. An exception simulates the missing memory."""

import logging
from contextlib import contextmanager

import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from row_files import write_splits
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
    """A backbone that runs out of memory above a number of rows, in its forward or its backward pass."""
    original = {name: getattr(backbone, name) for name in ("states", "hidden_states")}
    counts = []

    class FailInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("tried to allocate more than there is")

    def limit(name):
        def run(batch, *args, **kwargs):
            counts.append(len(batch))
            if len(batch) > rows and not backward:
                raise torch.OutOfMemoryError("tried to allocate more than there is")
            output = original[name](batch, *args, **kwargs)
            if len(batch) <= rows:
                return output
            if name == "states":
                return States(FailInBackward.apply(output.hidden), output.logits)
            return FailInBackward.apply(output)

        return run

    cls = type(backbone)
    backbone.__class__ = type("Limited", (cls,), {name: staticmethod(limit(name)) for name in original})
    try:
        yield counts
    finally:
        backbone.__class__ = cls


def build(backbone, kind, **more):
    cls, arguments = KINDS[kind]
    module = cls(**{"classes": tiny.CLASSES, **arguments, **more, "backbone": backbone.spec})
    module.attach(backbone, seed=1)
    return module.train()


def run_step(module, batch):
    """Returns the loss and the gradients of a step, and the next random numbers."""
    torch.manual_seed(5)
    module.zero_grad()
    logs = module.step(batch, 0.0)
    logs["loss"].backward()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = [torch.zeros(()) if parameter.grad is None else parameter.grad.clone() for parameter in trained]
    return logs["loss"].detach(), gradients, torch.rand(3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_parts_equals_the_step_without_parts(kind, family, backward, load):
    backbone = load(family)
    module = build(backbone, kind)
    batch = tiny.batch_of(backbone.codec, labels=LABELS)
    whole = run_step(module, batch)
    halving = Halving()
    module.step = RetryingStep(halving, module)
    with memory_for(backbone, 1, backward) as counts:
        in_parts = run_step(module, batch)
    assert halving.parts == 4
    assert max(counts) == 4
    for actual, expected in zip(in_parts, whole, strict=True):
        assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(in_parts[2], whole[2])
    assert "states" not in vars(backbone)


def test_later_steps_keep_the_parts(load):
    backbone = load("llama")
    module = build(backbone, "prompt tuning, dropout")
    batch = tiny.batch_of(backbone.codec, labels=LABELS)
    halving = Halving()
    module.step = RetryingStep(halving, module)
    with memory_for(backbone, 2) as counts:
        run_step(module, batch)
        counts.clear()
        run_step(module, batch)
    assert max(counts) == 2
    restored = Halving()
    restored.load_state_dict(halving.state_dict())
    assert restored.parts == 2


def test_one_row_that_does_not_fit_stops_the_run_with_advice(load):
    backbone = load("llama")
    module = build(backbone, "prompt tuning, dropout")
    module.step = RetryingStep(Halving(), module)
    with memory_for(backbone, 0), pytest.raises(torch.OutOfMemoryError, match=r"single row .* data\.max_tokens"):
        run_step(module, tiny.batch_of(backbone.codec, labels=LABELS))


def train(module, backbone, rows, callbacks=(), **options):
    """Trains with memory for some rows; returns the trained parameters."""
    batches = DataLoader([tiny.batch_of(backbone.codec, labels=LABELS)] * 4, batch_size=None)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    torch.manual_seed(7)
    with memory_for(backbone, rows):
        trainer.fit(module, batches)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.cat([parameter.detach().flatten() for parameter in trained])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "more"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_training_in_parts_equals_the_training_without_parts(count, options, load, caplog):
    results = []
    for rows, callbacks in ((4, []), (1, [Halving()])):
        torch.manual_seed(0)
        backbone = load("llama")
        module = PromptTuning(length=3, prompt_dropout=0.5, classes=tiny.CLASSES, backbone=backbone.spec)
        module = module if count == 1 else Replicas(module, ReplicaSpec(count))
        for k, method in enumerate(module.methods):
            method.attach(backbone, k)
        with caplog.at_level(logging.WARNING):
            results.append(train(module, backbone, rows, callbacks, **options))
        assert all("step" not in vars(method) for method in module.methods)
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert "splitting the 4 rows of each step into 2 parts" in caplog.text
    assert "splitting the 4 rows of each step into 4 parts" in caplog.text


def test_half_precision_scales_its_losses_within_the_step(load):
    backbone = load("llama")
    module = build(backbone, "mean over tokens")
    batch = tiny.batch_of(backbone.codec, labels=LABELS)
    plain = run_step(module, batch)
    module.step = RetryingStep(Halving(), module, torch.amp.GradScaler("cpu", init_scale=1024.0))
    for actual, expected in zip(run_step(module, batch)[:2], plain[:2], strict=True):
        assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_option_enables_the_callback(tmp_path, rows, tiny_folder):
    write_splits(tmp_path, train=rows, validation=rows)
    tokens = []
    for option in ("true", "false"):
        words = [
            "fit", "--model=PromptTuning", "--model.length=3", f"--backbone.name={tiny_folder('llama')}",
            "--data=ClassificationDataModule", f"--data.path={tmp_path}", "--data.template={soft}{text} it is{target}",
            '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--data.batch_size=2",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_steps=3",
            f"--run.folder={tmp_path / 'runs'}", f"--run.halve_on_oom={option}", "--run.wandb=disabled",
        ]  # fmt: skip
        assert main(words) == 0
        checkpoint = torch.load(last_folder() / "checkpoints" / "last.ckpt", weights_only=True)
        assert ("Halving" in checkpoint["callbacks"]) == (option == "true")
        tokens.append(checkpoint["state_dict"]["tokens"])
    assert_close(*tokens, rtol=1e-5, atol=1e-6)
