"""The checkpoint to go on from: of the last validation, or of the last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn


class FinalCheckpoint(Checkpoint):
    """Saves after each validation, and at the step that `max_steps` names: from there a longer run goes on exactly.

    Lightning's own checkpoints are saved where the monitored metric is the best so far; a run that is killed would go
    on from there, one that ends between two validations would lose its last steps, and one that is shorter than the
    first would leave nothing. Where a validation falls on the last step, it is saved after that: a run that is killed
    in between must not go on without it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within the epoch: at its end Lightning would count the rest of it as done."""
        if trainer.global_step == trainer.max_steps and not self._is_validated(trainer):
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves when the checkpoints before it, callbacks of the same kind, have seen the metric."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    @staticmethod
    def _is_validated(trainer: Trainer) -> bool:
        """Whether a validation follows this batch, which only the loop knows."""
        loop = trainer.fit_loop
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
