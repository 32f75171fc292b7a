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
from lightning_softprompt.objectives.base import Objective, Outcome
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
    """Pulls its prompt towards 0.2; the loss or the gradient of a bad row is NaN, as `fault` names it."""

    def __init__(self, fault=None, scale=1.0, bad=(BAD,)):
        super().__init__()
        self.prompt = nn.Parameter(torch.full((3,), 0.1))
        self.fault, self.scale, self.bad = fault, scale, set(bad)
        self.prompts = []  # before each step
        self.methods = [self]

    def step(self, batch):
        loss = ((self.scale * self.prompt - 0.2) ** 2).mean() + 0 * torch.rand(())
        if self.bad.isdisjoint(batch.row_ids):
            return {"loss": loss}
        if self.fault == "loss":
            loss = loss * float("nan")
        elif self.fault == "gradient":
            loss = loss + (0 * self.prompt.sum()).sqrt()
        return {"loss": loss}

    def training_step(self, batch, batch_idx):
        self.prompts.append(self.prompt.detach().clone())
        self.step_rows = [batch]
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


def read_records(folder):
    return [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_run_stops_before_the_step_and_names_the_row(tmp_path, fault):
    net = Net(fault)
    with pytest.raises(NonFiniteError, match=r"optimizer step 3 .* rows train.jsonl:10 \('text 9'\).*bad_rows.jsonl"):
        fit(net, tmp_path)
    (record,) = read_records(tmp_path)
    assert (record["row"], record["step"], record["epoch"], record["text"]) == (BAD, 3, 0, "text 9")
    assert record["where"] == "train.jsonl:10"
    assert (record["loss"] is None) == (fault == "loss")
    assert not record["gradient_is_finite"]
    assert torch.isfinite(net.prompt).all()
    saved = torch.load(tmp_path / "good.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert torch.equal(saved["state_dict"]["prompt"], net.prompts[2])


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing(tmp_path, fault):
    net, good = Net(fault), Net()
    guard = fit(net, tmp_path / "bad", skip=1)
    fit(good, tmp_path / "good")
    assert guard.skipped == 1
    assert [r["row"] for r in read_records(tmp_path / "bad")] == [BAD]
    assert torch.equal(net.prompts[3], net.prompts[2])
    assert torch.equal(net.prompt, good.prompts[5])  # one of six steps is missing


def test_too_many_consecutive_skipped_steps_stop_the_run(tmp_path):
    fit(Net("loss"), tmp_path / "apart", skip=1, max_epochs=2)
    assert [r["step"] for r in read_records(tmp_path / "apart")] == [3, 9]
    with pytest.raises(NonFiniteError, match=r"optimizer step 5 .* after 2 skipped steps"):
        fit(Net("loss", bad=range(BAD, ROWS)), tmp_path, skip=2)


def test_the_bad_row_of_accumulated_batches_is_found(tmp_path):
    with pytest.raises(NonFiniteError, match="optimizer step 2 "):
        fit(Net("loss"), tmp_path, accumulate_grad_batches=2)
    assert [r["row"] for r in read_records(tmp_path)] == [BAD]


def test_all_rows_are_reported_if_no_single_row_is_bad(tmp_path):
    class BadInBatches(Net):
        def step(self, batch):
            factor = float("inf") if len(batch) > 1 else 1
            return {"loss": factor * super().step(batch)["loss"]}

    with pytest.raises(NonFiniteError, match="optimizer step 1 "):
        fit(BadInBatches(), tmp_path)
    assert [record["row"] for record in read_records(tmp_path)] == list(range(SIZE))
    assert all(record["whole_batch"] for record in read_records(tmp_path))
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
    assert [r["row"] for r in read_records(tmp_path)] == [BAD]


def test_a_gradient_that_overflows_after_scaling_is_left_to_the_scaler(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    net = Net(scale=100.0)
    net.prompt.data.fill_(0.003)
    guard = fit(net, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() < 1e38
    assert not torch.equal(net.prompt, net.prompts[0])
    assert guard.skipped == 0
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFiniteError, match=r"rows train.jsonl:10 "):
        fit(Net("loss"), tmp_path, plugins=[plugin])


def test_a_delayed_check_still_precedes_the_checkpoint(tmp_path, monkeypatch):
    """As on a GPU, where the gradient is set to zero and the host reads the result of the check one step later."""
    monkeypatch.setattr(NumericGuard, "_is_immediate", lambda *_: False)
    net = Net("loss")
    with pytest.raises(NonFiniteError, match=r"optimizer step 3 .* rows train.jsonl:10 "):
        fit(net, tmp_path)
    assert torch.isfinite(net.prompt).all()
    assert torch.load(tmp_path / "good.ckpt", weights_only=True)["global_step"] == 2
    unsaved = Net("loss")
    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", lambda *_: None)
    with pytest.raises(NonFiniteError, match=r"optimizer step 3 .* rows train.jsonl:10 "):
        fit(unsaved, tmp_path / "unsaved")
    assert len(unsaved.prompts) == 4  # the next step ran already
    assert torch.isfinite(unsaved.prompt).all()
    good = Net()
    fit(good, tmp_path / "good")
    assert len(good.prompts) == 6


def test_a_spike_is_detected_and_ordinary_losses_are_not():
    torch.manual_seed(0)
    spikes = SpikeDetector()
    noise = (2 + 0.3 * torch.randn(500)).tolist()
    assert not any(spikes.update(loss) for loss in noise)
    assert spikes.update(9.0)
    assert spikes.mean == pytest.approx(2, abs=0.3)
    decreasing = SpikeDetector()
    assert not any(decreasing.update(4 * 0.99**n) for n in range(500))


def test_the_warning_of_a_spike_names_step_and_rows(tmp_path, caplog):
    class Spiky(Net):
        def step(self, batch):
            noise = 1 + 0.1 * torch.rand(())
            scale = 50 if self.global_step == 27 else 1
            return {"loss": super().step(batch)["loss"] + scale * noise}

    with caplog.at_level(logging.WARNING, "lightning_softprompt"):
        fit(Spiky(), tmp_path, max_epochs=6)
    messages = [record.getMessage() for record in caplog.records]
    (message,) = [message for message in messages if "running mean" in message]
    assert message.startswith("Optimizer step 28: ")
    assert message.endswith("rows [12, 13, 14, 15]")


class NanForLongRows(Objective):
    """The loss of classification, or NaN for long rows."""

    def __call__(self, lm, batch):
        outcome = Classification()(lm, batch)
        is_long = int(batch.mask.sum()) > 13
        return Outcome(outcome.loss * (float("nan") if is_long else 1))


@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_methods_and_replicas_are_named(load, count):
    backbone = load("llama")
    method = PromptTuning(length=3, classes=tiny.CLASSES, prompt_dropout=0.5)
    method.training_loss.objective = NanForLongRows()
    module = Replicas(method, ReplicaSpec(count)) if count > 1 else method
    for seed, each in enumerate(module.methods):
        each.attach(backbone, seed)
    rows = tiny.batch_of(backbone.codec, labels=torch.tensor([0, 1, 2, 0]))
    before = torch.get_rng_state()
    (record,) = find_nonfinite_rows(module, rows)
    assert (record["row"], record["loss"], record["whole_batch"]) == (2, None, False)
    assert "it is a sad story about a dog" in record["text"]  # as the backbone reads it
    assert torch.equal(torch.get_rng_state(), before)
