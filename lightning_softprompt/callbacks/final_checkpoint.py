"""A checkpoint of the last step, whether or not a validation falls on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class FinalCheckpoint(Checkpoint):
    """Saves at the step that `max_steps` names, from where a longer run goes on exactly.

    Lightning's own checkpoints are tied to validation or to a fixed interval; a run that ends between two would lose
    its last steps, and one that is shorter than the first would leave nothing.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within the epoch: at its end Lightning would count the rest of it as done."""
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)
