"""A run that was stopped and resumed must equal the uninterrupted run bit for bit."""

import logging
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_softprompt.callbacks.recovery.resume import RngState
from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler, ResumableLoader

ROWS, BATCH, EPOCHS = 22, 4, 3  # 6 batches an epoch, one of them short
LENGTHS = np.random.default_rng(0).integers(1, 30, ROWS).tolist()


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Numbers(torch.utils.data.Dataset):
    """The number and the features of each row; the features are noisy if `noise` is set."""

    def __init__(self, noise=0.0):
        self.noise = noise
        self.features = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return index, self.features[index] + (self.noise * torch.randn(8) if self.noise else 0)


def collate(rows):
    numbers, features = zip(*rows, strict=True)
    return torch.tensor(numbers), torch.stack(features)


class Net(pl.LightningModule):
    """Draws from all generators, in validation too, and remembers rows and loss of every step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.steps = []

    def training_step(self, batch):
        numbers, features = batch
        loss = (self.net(features) - random.random() - np.random.rand()).square().mean()
        self.steps.append((numbers.tolist(), loss.item()))
        return loss

    def validation_step(self, batch):
        self.net(batch[1] * torch.rand(()) * random.random() * np.random.rand())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"},
        }


class AfterValidation(ModelCheckpoint):
    """Lightning distinguishes checkpoint callbacks by class and interval."""


def loaders(num_workers, noise, **ranks):
    train = BucketBatchSampler(LENGTHS, BATCH, order="shuffled", seed=3, **ranks)
    evaluate = BucketBatchSampler(LENGTHS, BATCH, order="longest_first")
    return (
        ResumableLoader(Numbers(noise), train, collate, num_workers),
        ResumableLoader(Numbers(), evaluate, collate),
    )


def fit(folder, seed, ckpt_path=None, num_workers=0, noise=0.0, epochs=EPOCHS, **options):
    pl.seed_everything(seed, verbose=False)
    net = Net()
    train, evaluate = loaders(num_workers, noise)
    every = {"save_top_k": -1, "filename": "{step}"}
    saving = [
        ModelCheckpoint(folder / "batch_end", every_n_train_steps=1, **every),
        ModelCheckpoint(folder / "epoch_end", every_n_epochs=1, save_on_train_epoch_end=True, **every),
        AfterValidation(folder / "validation_end", every_n_epochs=1, save_on_train_epoch_end=False, **every),
    ]
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RngState(), *saving],
        **options,
    )
    trainer.fit(net, train, evaluate, ckpt_path=ckpt_path, weights_only=True)
    return net.steps


def batches_seen(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    return state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]


RUNS = {
    "plain": {},
    "no validation": {"limit_val_batches": 0},
    "validation within the epoch": {"val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation and validation": {"accumulate_grad_batches": 2, "val_check_interval": 2},
    "rows with noise": {"noise": 0.1},
    "epochs ended early": {"limit_train_batches": 4},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_every_checkpoint_continues_like_the_uninterrupted_run(tmp_path, options):
    whole = fit(tmp_path / "whole", seed=0, **options)
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    batches = {batches_seen(checkpoint) for checkpoint in checkpoints}
    per_epoch = len(whole) // EPOCHS
    assert {2, per_epoch, per_epoch + 2, 2 * per_epoch} <= batches
    for checkpoint in checkpoints:
        done = batches_seen(checkpoint)
        rest = fit(tmp_path / "rest", seed=1, ckpt_path=checkpoint, **options)
        assert rest == whole[done:], checkpoint


def test_validation_changes_nothing(tmp_path):
    runs = [{"limit_val_batches": 0}, {"num_sanity_val_steps": 0}, {"val_check_interval": 2}]
    steps = [fit(tmp_path / str(number), seed=0, **options) for number, options in enumerate(runs)]
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("done", [2, 6, 8])
def test_workers_that_load_ahead_change_nothing(tmp_path, done):
    whole = fit(tmp_path / "whole", seed=0)
    assert fit(tmp_path / "ahead", seed=0, num_workers=2, limit_val_batches=0) == whole
    checkpoint = tmp_path / "ahead" / "batch_end" / f"step={done}.ckpt"
    assert fit(tmp_path / "rest", seed=1, ckpt_path=checkpoint, num_workers=2, limit_val_batches=0) == whole[done:]


def test_a_finished_run_continues_for_more_epochs(tmp_path):
    whole = fit(tmp_path / "whole", seed=0, epochs=2)
    fit(tmp_path / "half", seed=0, epochs=1)
    for checkpoint in sorted((tmp_path / "half").rglob("step=6.ckpt")):
        assert fit(tmp_path / "rest", seed=1, epochs=2, ckpt_path=checkpoint) == whole[6:], checkpoint


def test_without_the_random_states_the_same_rows_give_other_losses(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole", seed=0)
    monkeypatch.setattr(RngState, "on_train_start", lambda *_: None)
    rest = fit(tmp_path / "rest", seed=1, ckpt_path=tmp_path / "whole" / "batch_end" / "step=2.ckpt")
    assert [rows for rows, _ in rest] == [rows for rows, _ in whole[2:]]
    assert [loss for _, loss in rest] != [loss for _, loss in whole[2:]]


def test_prediction_uses_the_loader_unchanged():
    class Predict(Net):
        def predict_step(self, batch):
            return batch[0]

    sampler = BucketBatchSampler(LENGTHS, BATCH, order="given")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    rows = trainer.predict(Predict(), ResumableLoader(Numbers(), sampler, collate))
    assert torch.cat(rows).tolist() == list(range(ROWS))


class TwoRanks(pl.LightningDataModule):
    """Loaders for each rank, under a random seed of the rank."""

    def setup(self, stage):
        pl.seed_everything(self.trainer.global_rank, verbose=False)

    def train_dataloader(self):
        return loaders(0, 0.0, rank=self.trainer.global_rank, world_size=2)[0]


class Record(pl.Callback):
    """Writes the steps of a rank to a file, because its process ends with the run."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, net):
        torch.save(net.steps, self.folder / f"rank{trainer.global_rank}.pt")


def fit_two_ranks(folder, ckpt_path=None):
    folder.mkdir()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        strategy="ddp_fork",
        devices=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RngState(), Record(folder), ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(Net(), datamodule=TwoRanks(), ckpt_path=ckpt_path, weights_only=True)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def rows_of_steps(steps):
    return {row for rows, _ in steps for row in rows}


def test_two_ranks_continue_each_with_its_own_rows_and_random_numbers(tmp_path):
    whole = fit_two_ranks(tmp_path / "whole")
    assert not rows_of_steps(whole[0][:3]) & rows_of_steps(whole[1][:3])
    checkpoint = tmp_path / "whole" / "epoch=0-step=2.ckpt"
    first, second = torch.load(checkpoint, weights_only=True)["callbacks"]["RngState"]["ranks"]
    assert not torch.equal(first["torch"], second["torch"])
    assert fit_two_ranks(tmp_path / "rest", checkpoint) == [steps[2:] for steps in whole]
