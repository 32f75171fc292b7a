"""Callbacks for the configs of tests."""

from copy import deepcopy

from lightning.pytorch import Callback


class Rows(Callback):
    """Records the rows of each epoch."""

    seen: dict = {}  # noqa: RUF012 (a config names the class, so a test has no reference to the object)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).append(list(batch.row_ids))


class Copying(Callback):
    """Copies the module in setup, which is too early for an average."""

    def setup(self, trainer, pl_module, stage):
        self.copy = deepcopy(pl_module)
