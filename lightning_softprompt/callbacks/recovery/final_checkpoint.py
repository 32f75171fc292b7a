"""The checkpoint to resume from: that of the last validation, or of the last step."""

from __future__ import annotations

import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_softprompt.system.atomic_files import write_file


class FinalCheckpoint(Checkpoint):
    """Saves after each validation and at step `max_steps`, so that a longer run can resume exactly.

    Lightning saves a checkpoint only if the monitored metric improves: a killed run would resume from there, a run that
    ends between two validations would lose its last steps, and a run that ends before the first validation would save
    nothing. If a validation falls on the last step, the checkpoint is saved after it, so that a resumed run does not
    omit it. If a validation falls between the batches of an accumulated step, the checkpoint is saved after the step,
    because checkpoints contain no gradients. A run that ends without any of these is saved at its end. A run with
    `max_steps` 0 is saved, too: its prompt is where the next run starts.

    Args:
        path: The file.
        keep: Number of recent checkpoints to keep, the earlier ones as `last-1.ckpt`, `last-2.ckpt`, ...
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path = path
        self.names = [path]
        for number in range(1, keep):
            self.names.append(path.with_stem(f"{path.stem}-{number}"))
        self._step = 0  # at the start of the run
        self._saved = False
        self._saved_step = 0  # of the last save
        self._due = False  # whether a validation took place between the batches of a step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the first step: a run resumed at its end takes no step and keeps its checkpoint."""
        self._step, self._saved, self._due = trainer.global_step, False, False
        self._saved_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within the epoch: at its end, Lightning would record all its batches as processed."""
        is_last = trainer.global_step == trainer.max_steps
        if (is_last or self._due) and not _is_accumulating(trainer) and not self._is_validated(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the other checkpoint callbacks, which run first, have seen the metric."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._due = _is_accumulating(trainer)
            if not self._due:
                self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if no validation and no step limit has caused a save."""
        if not self._saved and trainer.global_step > self._step:
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a run that takes no step; Lightning calls none of the hooks of a training."""
        if trainer.max_steps == 0:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if a callback stops the training because its metric is missing, which happens between two steps."""
        if lacks_metric(exception) and trainer.global_step > max(self._step, self._saved_step):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.path.exists():
            self._rotate()
        trainer.save_checkpoint(self.path)
        self._saved, self._due, self._saved_step = True, False, trainer.global_step

    def _rotate(self) -> None:
        """Rotate the existing checkpoints; the last one stays in place until it is replaced."""
        for earlier, later in reversed(list(pairwise(self.names[1:]))):
            if earlier.exists():
                earlier.replace(later)
        for second in self.names[1:2]:
            write_file(second, self.path.read_bytes())

    @staticmethod
    def _is_validated(trainer: Trainer) -> bool:
        """Whether a validation follows this batch."""
        loop = trainer.fit_loop
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def lacks_metric(error: BaseException | None) -> bool:
    """Whether an error was raised by a callback of Lightning because its metric is missing."""
    if not isinstance(error, RuntimeError | MisconfigurationException):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).name in ("early_stopping.py", "model_checkpoint.py")


def _is_accumulating(trainer: Trainer) -> bool:
    """Whether gradients are being accumulated for a later step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()
