"""Callbacks that a config of a test names."""

from copy import deepcopy

from lightning.pytorch import Callback


class Rows(Callback):
    """The rows that each epoch trains on, for a test to read."""

    seen: dict = {}  # noqa: RUF012 (a config names the class, so a test cannot hold the object)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).append(list(batch.row_ids))


class Copying(Callback):
    """Averages a copy that it makes too early."""

    def setup(self, trainer, pl_module, stage):
        self.copy = deepcopy(pl_module)
