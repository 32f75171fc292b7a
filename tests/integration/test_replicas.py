"""Several prompts in one run equal runs of each one alone."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny import batch_of
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_softprompt.callbacks.recovery.resume import RngState
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Normal, Uniform
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

FAMILIES = ("llama", "bert")
LABELS = (0, 1, 1, 0)


class Noisy(SoftPromptModule):
    """Draws random numbers in each step."""

    def build(self, backbone):
        self.tokens = torch.nn.Parameter(torch.randn(2, backbone.hidden_size))

    def prompt(self, batch):
        return SoftPrompt(tokens=(self.tokens + 0.1 * torch.randn_like(self.tokens))[None])


def train(module: LightningModule, batch, seed, **options):
    torch.manual_seed(seed)
    trainer = Trainer(
        accelerator="cpu", max_steps=20, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=5, callbacks=[RngState()], **options,
    )  # fmt: skip
    loader_options = {
        "batch_size": None,
        "generator": torch.Generator(),
    }  # so that loaders do not draw from the default generator
    trainer.fit(module, DataLoader([batch] * 4, **loader_options), DataLoader([batch] * 2, **loader_options))
    return module, dict(trainer.callback_metrics)


def build_method(cls, backbone, classes, **arguments):
    evaluation = ClassificationEvaluation(classes.names)
    return cls(backbone=backbone.spec, classes=classes, evaluation=evaluation, **arguments)


@pytest.mark.parametrize("kind", [partial(PromptTuning, length=3), Noisy], ids=["prompt tuning", "one with noise"])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}], ids=["plain", "clipped, accumulated"]
)
def test_each_replica_equals_a_run_alone(backbone, classes, kind, options):
    batch = batch_of(backbone.codec, labels=LABELS)
    arguments = {"optimizer": partial(AdamW, lr=0.02), "scheduler": partial(StepLR, step_size=3, gamma=0.5)}
    together, metrics = train(
        Replicas(build_method(kind, backbone, classes, **arguments), ReplicaSpec(3, seeds=[4, 9, 5])),
        batch,
        4,
        **options,
    )
    for name, replica, seed in zip(together.replica_names, together.methods, (4, 9, 5), strict=True):
        alone, expected = train(build_method(kind, backbone, classes, **arguments), batch, seed, **options)
        torch.testing.assert_close(replica.tokens, alone.tokens, rtol=1e-5, atol=1e-7)
        for metric, value in expected.items():
            if metric.startswith(("val/", "train/")):
                torch.testing.assert_close(metrics[f"{metric}/{name}"], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(together.methods[0].tokens, together.methods[1].tokens)
    accuracies = torch.stack([metrics[f"val/loss/{name}"] for name in together.replica_names])
    torch.testing.assert_close(metrics["val/loss"], accuracies.mean())
    torch.testing.assert_close(metrics["val/loss/interval"], 4.302653 * accuracies.std() / 3**0.5, rtol=1e-4, atol=1e-6)


def test_evaluations_get_the_epoch(backbone, classes, monkeypatch):
    epochs = []
    monkeypatch.setattr(ClassificationEvaluation, "begin", lambda self, stage, epoch: epochs.append((stage, epoch)))
    module = Replicas(build_method(partial(PromptTuning, length=3), backbone, classes), ReplicaSpec(2))
    train(module, batch_of(backbone.codec, labels=LABELS), 4, num_sanity_val_steps=0)
    assert epochs == [("val", epoch) for epoch in range(5) for _ in range(2)]


def test_learning_rates_and_starts_may_differ(backbone, classes):
    batch = batch_of(backbone.codec, labels=LABELS)
    spec = ReplicaSpec(2, seeds=[3, 3], learning_rates=[0.1, 0.01], inits=[Uniform(), Normal()])
    method = partial(build_method, PromptTuning, backbone, classes, length=3)
    together, _ = train(Replicas(method(optimizer=partial(SGD, lr=9.0)), spec), batch, 3)
    for replica, rate, init in zip(together.methods, (0.1, 0.01), (Uniform(), Normal()), strict=True):
        alone, _ = train(method(optimizer=partial(SGD, lr=rate), init=init), batch, 3)
        torch.testing.assert_close(replica.tokens, alone.tokens, rtol=1e-5, atol=1e-7)


def test_lists_of_another_length_and_methods_without_a_start_are_refused(backbone, classes):
    with pytest.raises(ValueError, match=r"replicas\.seeds must have 3 values"):
        ReplicaSpec(3, seeds=[1, 2])
    with pytest.raises(ValueError, match="which Noisy lacks"):
        Replicas(build_method(Noisy, backbone, classes), ReplicaSpec(2, inits=[Uniform(), Normal()]))


@pytest.mark.parametrize("how", ["average", "vote"])
def test_together_they_are_an_ensemble(backbone, classes, how):
    batch = batch_of(backbone.codec, labels=LABELS)
    method = build_method(partial(PromptTuning, length=3), backbone, classes, optimizer=partial(AdamW, lr=0.02))
    together, metrics = train(Replicas(method, ReplicaSpec(3, seeds=[4, 9, 5], ensemble=how)), batch, 4)
    shares = torch.stack([replica.eval().lm().scores(batch).softmax(-1) for replica in together.methods])
    predictions = shares.mean(0).argmax(-1)
    if how == "vote":
        for b in range(len(batch)):
            votes = shares[:, b].argmax(-1).bincount(minlength=3)
            predictions[b] = (votes + shares[:, b].mean(0)).argmax()
    accuracy = (predictions == torch.tensor(LABELS)).float().mean()
    torch.testing.assert_close(metrics["val/accuracy/ensemble"], accuracy)
