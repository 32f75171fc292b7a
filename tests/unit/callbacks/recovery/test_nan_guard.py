import json
import logging

import pytest
import tiny
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_softprompt.callbacks.recovery.bad_rows import find_nonfinite_rows
from lightning_softprompt.callbacks.recovery.nan_guard import NonFiniteError, NumericGuard, SpikeDetector
from lightning_softprompt.core.types import Batch, Example
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

ROWS, SIZE = 24, 4
BAD = 9  # in the third batch


def batch(rows):
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    zeros = torch.zeros(len(rows), 1)
    examples = tuple(Example({"text": f"text {row}"}, "good") for row in rows)
    return Batch(mask.long(), mask, mask, zeros, zeros, row_ids=tuple(rows), examples=examples)


class Rows(LightningDataModule):
    def __init__(self, world=1):
        super().__init__()
        self.world = world

    def where(self, split, row):
        return f"{split}.jsonl:{row + 1}"

    def train_dataloader(self):
        rank = self.trainer.global_rank if self.world > 1 else 0
        return DataLoader(range(rank, ROWS, self.world), batch_size=SIZE // self.world, collate_fn=batch)


class Net(LightningModule):
    """Draws its prompt towards a number of each row; what is wrong with the bad row is told by `fault`."""

    def __init__(self, fault=None, scale=1.0, bad=(BAD,)):
        super().__init__()
        self.prompt = nn.Parameter(torch.full((3,), 0.1))
        self.fault, self.scale, self.bad, self.steps = fault, scale, set(bad), []
        self.methods = [self]

    def step(self, batch):
        loss = ((self.scale * self.prompt - 0.2) ** 2).mean() + 0 * torch.rand(())
        if self.fault and self.bad & set(batch.row_ids):
            loss = loss * float("nan") if self.fault == "loss" else loss + (0 * self.prompt.sum()).sqrt()
        return {"loss": loss}

    def training_step(self, batch, batch_idx):
        self.steps.append(self.prompt.detach().clone())
        return self.step(batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(net, folder, skip=0, world=1, **options):
    seed_everything(1, verbose=False)
    guard = NumericGuard(folder / "bad_rows.jsonl", skip)
    saving = ModelCheckpoint(folder, "good", every_n_train_steps=1)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[guard, saving], **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(net, datamodule=Rows(world))
    return guard


def lines(folder):
    return [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_run_stops_before_the_step_and_names_the_row(tmp_path, fault):
    net = Net(fault)
    with pytest.raises(NonFiniteError, match=r"optimizer step 3 .* rows train.jsonl:10 \('text 9'\).*bad_rows.jsonl"):
        fit(net, tmp_path)
    (record,) = lines(tmp_path)
    assert (record["row"], record["step"], record["epoch"], record["text"]) == (BAD, 3, 0, "text 9")
    assert record["where"] == "train.jsonl:10"
    assert (record["loss"] is None) == (fault == "loss")
    assert not record["gradient_is_finite"]
    assert torch.isfinite(net.prompt).all()
    saved = torch.load(tmp_path / "good.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert torch.equal(saved["state_dict"]["prompt"], net.steps[2])


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_left_out_changes_nothing(tmp_path, fault):
    net, good = Net(fault), Net()
    guard = fit(net, tmp_path / "bad", skip=1)
    fit(good, tmp_path / "good")
    assert guard.skipped == 1
    assert [r["row"] for r in lines(tmp_path / "bad")] == [BAD]
    assert torch.equal(net.steps[3], net.steps[2])
    assert torch.equal(net.prompt, good.steps[5])  # of six steps one is missing


def test_too_many_steps_in_sequence_stop_the_run(tmp_path):
    fit(Net("loss"), tmp_path / "apart", skip=1, max_epochs=2)
    assert [r["step"] for r in lines(tmp_path / "apart")] == [3, 9]
    with pytest.raises(NonFiniteError, match=r"optimizer step 5 .* after 2 skipped steps"):
        fit(Net("loss", bad=range(BAD, ROWS)), tmp_path, skip=2)


def test_rows_of_steps_that_are_added_up_are_told_apart(tmp_path):
    with pytest.raises(NonFiniteError, match="optimizer step 2 "):
        fit(Net("loss"), tmp_path, accumulate_grad_batches=2)
    assert [r["row"] for r in lines(tmp_path)] == [BAD]


def test_all_rows_are_told_where_none_is_bad_alone(tmp_path):
    class Together(Net):
        def step(self, batch):
            return {"loss": super().step(batch)["loss"] * (float("inf") if len(batch) > 1 else 1)}

    with pytest.raises(NonFiniteError, match="optimizer step 1 "):
        fit(Together(), tmp_path)
    assert [(r["row"], r["whole_batch"]) for r in lines(tmp_path)] == [(row, True) for row in range(SIZE)]
    assert not (tmp_path / "good.ckpt").exists()


@pytest.mark.parametrize("skip", [0, 1])
def test_two_processes_stop_or_skip_together(tmp_path, skip):
    run = {"world": 2, "strategy": "ddp_fork", "devices": 2, "skip": skip}
    if skip:
        fit(Net("loss"), tmp_path, **run)
        assert torch.load(tmp_path / "good.ckpt", weights_only=True)["global_step"] == 6
    else:
        with pytest.raises(Exception, match="optimizer step 3 loss or gradient is not finite"):
            fit(Net("loss"), tmp_path, **run)
        assert torch.load(tmp_path / "good.ckpt", weights_only=True)["global_step"] == 2
    assert [r["row"] for r in lines(tmp_path)] == [BAD]


def test_a_gradient_that_was_scaled_too_far_is_the_scalers_business(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    net = Net(scale=100.0)
    net.prompt.data.fill_(0.003)
    guard = fit(net, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() < 1e38
    assert not torch.equal(net.prompt, net.steps[0])
    assert guard.skipped == 0
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFiniteError, match=r"rows train.jsonl:10 "):
        fit(Net("loss"), tmp_path, plugins=[plugin])


def test_a_verdict_that_comes_later_still_comes_before_the_checkpoint(tmp_path, monkeypatch):
    """As on a GPU, where the gradient is made zero, and the host reads a step later why."""
    monkeypatch.setattr(NumericGuard, "_is_immediate", lambda *_: False)
    net = Net("loss")
    with pytest.raises(NonFiniteError, match=r"optimizer step 3 .* rows train.jsonl:10 "):
        fit(net, tmp_path)
    assert torch.isfinite(net.prompt).all()
    assert torch.load(tmp_path / "good.ckpt", weights_only=True)["global_step"] == 2
    again = Net("loss")
    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", lambda *_: None)
    with pytest.raises(NonFiniteError, match=r"optimizer step 3 .* rows train.jsonl:10 "):
        fit(again, tmp_path / "unsaved")
    assert len(again.steps) == 4  # the next one ran already
    assert torch.isfinite(again.prompt).all()
    good = Net()
    fit(good, tmp_path / "good")
    assert len(good.steps) == 6


def test_spikes_are_told_of_and_ordinary_losses_are_not(caplog):
    torch.manual_seed(0)
    spikes = SpikeDetector()
    noise = (2 + 0.3 * torch.randn(500)).tolist()
    assert not any(spikes.update(loss) for loss in noise)
    assert spikes.update(9.0)
    assert spikes.mean == pytest.approx(2, abs=0.3)
    steep = SpikeDetector()
    assert not any(steep.update(4 * 0.99**n) for n in range(500))


def test_a_spike_names_step_and_rows(tmp_path, caplog):
    class Spiky(Net):
        def step(self, batch):
            noise = 1 + 0.1 * torch.rand(())
            return {"loss": super().step(batch)["loss"] + noise * (50 if self.global_step == 27 else 1)}

    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        fit(Spiky(), tmp_path, max_epochs=6)
    (told,) = [r.getMessage() for r in caplog.records if "running mean" in r.getMessage()]
    assert told.startswith("Optimizer step 28: ")
    assert told.endswith("rows [12, 13, 14, 15]")


def poisoned(lm, batch):
    """Ordinary, but for long rows."""
    outcome = Classification()(lm, batch)
    return Outcome(outcome.loss * (float("nan") if int(batch.mask.sum()) > 13 else 1))


@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_methods_and_replicas_are_named(load, count):
    backbone = load("llama")
    method = PromptTuning(length=3, classes=tiny.CLASSES, prompt_dropout=0.5)
    method.training_loss.objective = poisoned
    module = Replicas(method, ReplicaSpec(count)) if count > 1 else method
    for seed, each in enumerate(module.methods):
        each.attach(backbone, seed)
    rows = tiny.batch_of(backbone.codec, labels=torch.tensor([0, 1, 2, 0]))
    before = torch.get_rng_state()
    (record,) = find_nonfinite_rows(module, rows)
    assert (record["row"], record["loss"], record["whole_batch"]) == (2, None, False)
    assert "it is a sad story about a dog" in record["text"]  # as the backbone reads it
    assert torch.equal(torch.get_rng_state(), before)
