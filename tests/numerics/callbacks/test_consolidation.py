"""Elastic weight consolidation and synaptic intelligence by the equations of their papers, also in resumed runs."""

from functools import partial

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import CLASSES, batch_of
from torch.optim import SGD, AdamW
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_softprompt.callbacks.algorithms.consolidation import EWC, SynapticIntelligence
from lightning_softprompt.callbacks.recovery.resume import RngState
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import PromptTuning, ResidualPromptTuning
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

FAMILIES = ("llama", "bert")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
LABELS = {"first": (0, 1, 1, 0), "second": (2, 2, 0, 1)}


class Data(LightningDataModule):
    """The same two batches each epoch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def train_dataloader(self):
        halves = [self.batch.only([0, 1]), self.batch.only([2, 3])]
        return DataLoader(halves, batch_size=None, generator=torch.Generator())

    val_dataloader = train_dataloader


class Steps(Callback):
    """Records gradients and parameters of all steps, as the optimizer reads them."""

    def __init__(self):
        self.values, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.values.append(trainable_values(module))
        self.gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})


def trainable_values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.fixture
def fit(backbone, tmp_path, monkeypatch):
    """A function that trains on a task, and returns the module, the importance, the folder and the trainer."""

    def fit(
        callback, task="first", start=None, steps=6, name="run", optimizer=None, ckpt_path=None, more=(), **options
    ):
        monkeypatch.setenv("SOFTPROMPT_RUN_FOLDER", str(tmp_path / name))
        torch.manual_seed(0)
        module = ResidualPromptTuning(
            length=2, bottleneck=4, backbone=backbone.spec, classes=CLASSES, prompt_dropout=0.1,
            evaluation=ClassificationEvaluation(CLASSES.names), optimizer=optimizer or partial(AdamW, lr=0.05),
        )  # fmt: skip
        module.attach(backbone)
        if start is not None:
            module.load_state_dict(start)
        checkpoint = ModelCheckpoint(tmp_path / name, "best", monitor="val/loss", enable_version_counter=False)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, log_every_n_steps=1,
            enable_model_summary=False, callbacks=[callback, *more, RngState(), checkpoint], **options,
        )  # fmt: skip
        trainer.fit(module, datamodule=Data(batch_of(backbone.codec, labels=LABELS[task])), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / name / "last.ckpt")
        importance = read_prompt(tmp_path / name / "importance.safetensors").tensors
        return module, importance, tmp_path / name, trainer

    return fit


def best(folder):
    return torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]


def rows(backbone, task):
    batch = batch_of(backbone.codec, labels=LABELS[task])
    return [batch.only([b]) for b in range(4)]


def fisher(module, rows):
    """Return the mean over rows of the squared gradient of log p(class) for each parameter."""
    module.eval()
    total = {name: torch.zeros_like(p) for name, p in trainable_values(module).items()}
    for row in rows:
        module.zero_grad()
        module.lm().scores(row).log_softmax(-1)[0, int(row.labels)].backward()
        for name, p in module.named_parameters():
            if p.requires_grad:
                total[name] += p.grad**2 / len(rows)
    return total


def test_importance_is_the_fisher_information_of_the_best_prompt(fit, backbone):
    module, importance, folder, _ = fit(EWC())
    after = trainable_values(module)
    module.load_state_dict(best(folder))
    for name, expected in fisher(module, rows(backbone, "first")).items():
        assert expected.abs().sum() > 0
        assert_close(importance[f"importance/{name}"], expected, **CLOSE)
        assert_close(importance[f"anchor/{name}"], module.get_parameter(name).detach())
    saved = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert all(
        torch.equal(after[name], saved[name]) for name in after
    )  # the callback does not change the final parameters


def test_ewc_adds_a_term_for_each_earlier_task(fit, backbone):
    """The gradient of a step is that of the loss plus a term for each earlier task."""
    _, one, folder, _ = fit(EWC(), name="one")
    start = best(folder)
    _, both, folder_2, _ = fit(EWC(50.0, str(folder / "importance.safetensors")), "second", start, name="two")
    module = ResidualPromptTuning(length=2, bottleneck=4, backbone=backbone.spec, classes=CLASSES)
    module.attach(backbone)
    module.load_state_dict(best(folder_2))
    second = fisher(module, rows(backbone, "second"))
    anchors = best(folder), best(folder_2)
    for name in second:
        assert_close(both[f"importance/{name}"], one[f"importance/{name}"] + second[name], **CLOSE)
    plain, regularized = Steps(), Steps()
    options = {"steps": 2, "optimizer": partial(SGD, lr=0.1), "accumulate_grad_batches": 2}
    *_, trainer = fit(
        EWC(7.0, str(folder_2 / "importance.safetensors")), "first", start, name="three", more=[regularized], **options
    )
    fit(EWC(), "first", start, name="four", more=[plain], **options)
    for step, value in enumerate(regularized.values[:1]):
        for name, p in value.items():
            terms = [
                one[f"importance/{name}"] * (p - anchors[0][name]),
                second[name] * (p - anchors[1][name]),
            ]
            expected = plain.gradients[step][name] + 7.0 * sum(terms)
            assert_close(regularized.gradients[step][name], expected, **CLOSE)
    penalty = 0.0
    for name, p in regularized.values[-1].items():
        distance = p - both[f"anchor/{name}"]
        penalty += 7.0 / 2 * (both[f"importance/{name}"] * distance**2).sum()
    assert_close(trainer.callback_metrics["train/penalty/ewc"], penalty, **CLOSE)
    of_penalty, of_loss = [], []
    for name, p in regularized.values[-1].items():
        term = 7.0 * both[f"importance/{name}"] * (p - both[f"anchor/{name}"])
        of_penalty.append(term.norm())
        of_loss.append((regularized.gradients[-1][name] - term).norm())
    pull = torch.stack(of_penalty).norm() / torch.stack(of_loss).norm()
    assert_close(trainer.callback_metrics["train/penalty/ewc_pull"], pull, **CLOSE)


def test_ewc_reduces_forgetting(fit, backbone):
    """Compares the loss of the first task after the second, with and without EWC."""
    _, _, folder, _ = fit(EWC(), steps=20, name="one")
    start, losses = best(folder), {}
    for name, former in (("free", None), ("ewc", str(folder / "importance.safetensors"))):
        module, *_ = fit(EWC(1e5, former), "second", start, steps=20, name=name)
        first_batch = batch_of(backbone.codec, labels=LABELS["first"])
        losses[name] = float(module.eval().objective(module.lm(), first_batch).loss)
        if name == "ewc":
            module.load_state_dict(start)
            losses["before"] = float(module.objective(module.lm(), first_batch).loss)
    assert losses["ewc"] - losses["before"] < 0.2 * (losses["free"] - losses["before"])


@pytest.mark.parametrize("former", [False, True])
def test_synaptic_intelligence_sums_the_contributions_of_each_parameter(fit, former):
    path, start, before = None, None, None
    if former:
        _, before, folder, _ = fit(SynapticIntelligence(), name="one")
        path, start = str(folder / "importance.safetensors"), best(folder)
    steps = Steps()
    seen = SynapticIntelligence(3.0, path, damping=0.2)
    module, importance, folder, _ = fit(
        seen, "second", start, name="two", more=[steps], accumulate_grad_batches=2, max_epochs=-1, steps=4
    )
    count = torch.load(folder / "best.ckpt", weights_only=True)["global_step"]
    values = [*steps.values, trainable_values(module)][: count + 1]
    for name in values[0]:
        work = torch.zeros_like(values[0][name])
        for step in range(count):
            gradient = steps.gradients[step][name]
            if former:  # without the gradient of the penalty
                pull = before[f"importance/{name}"] * (values[step][name] - before[f"anchor/{name}"])
                gradient = gradient - 3.0 * pull
            work -= gradient * (values[step + 1][name] - values[step][name])
        distance = values[-1][name] - values[0][name]
        expected = 2 * work.clamp(min=0) / (distance**2 + 0.2)
        assert expected.sum() > 0
        expected = expected + (before[f"importance/{name}"] if former else 0)
        assert_close(importance[f"importance/{name}"], expected, rtol=1e-3, atol=1e-6)
        assert_close(importance[f"anchor/{name}"], values[-1][name])


@pytest.mark.parametrize("cls", [EWC, SynapticIntelligence])
def test_a_resumed_run_has_the_importance_of_the_uninterrupted_one(fit, cls, tmp_path):
    """Also if no step is left to train."""
    _, expected, *_ = fit(cls(), steps=6, name="whole")
    fit(cls(), steps=4, name="half")
    for name in ("half", "whole"):
        (tmp_path / name / "importance.safetensors").unlink()
        _, importance, *_ = fit(cls(), steps=6, name=name, ckpt_path=tmp_path / name / "last.ckpt")
        assert all(torch.equal(importance[key], expected[key]) for key in expected), name


def test_importance_of_other_parameters_and_replicas_are_refused(fit, tmp_path, backbone):
    _, _, folder, _ = fit(EWC(), steps=2, name="one")
    module = PromptTuning(length=2, backbone=backbone.spec)
    module.attach(backbone)
    with pytest.raises(ValueError, match="is of the parameters"):
        EWC(former=str(folder / "importance.safetensors")).on_fit_start(None, module)
    replicas = Replicas(PromptTuning(length=2, backbone=backbone.spec), ReplicaSpec(2))
    with pytest.raises(ValueError, match="for a single prompt; set replicas to 1"):
        EWC().on_fit_start(None, replicas)
