"""How many validations a training has, and the one after its last step."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.recovery.final_validation import FinalValidation, count_validations

BATCHES = 6  # of an epoch


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * 2

    def validation_step(self, batch, batch_idx):
        pass

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(BATCHES))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class CountValidations(Callback):
    """Records the number of validations before each batch, and the number that is expected."""

    def __init__(self):
        self.count, self.counts, self.expected = 0, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.counts.append(self.count)
        self.expected.append(count_validations(trainer, trainer.fit_loop.total_batch_idx))

    def on_validation_end(self, trainer, pl_module):
        self.count += 1


def train(tmp_path, max_steps, *callbacks, **options):
    counter = CountValidations()
    Trainer(
        max_steps=max_steps, callbacks=[counter, *callbacks], accelerator="cpu", logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **options,
    ).fit(Model())  # fmt: skip
    return counter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 2},
        {"val_check_interval": 4},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 2, "val_check_interval": 0.5},
        {"limit_val_batches": 0},
    ],
    ids=str,
)
def test_validations_are_counted_as_lightning_runs_them(options, tmp_path):
    counter = train(tmp_path, 4 * BATCHES, **options)
    assert counter.counts == counter.expected
    assert bool(counter.count) == (options.get("limit_val_batches") != 0)


def test_a_short_training_validates_after_its_last_step(tmp_path):
    assert train(tmp_path, 4).count == 0
    counter = train(tmp_path, 4, FinalValidation())
    assert (counter.count, counter.counts) == (1, [0, 0, 0, 0])
