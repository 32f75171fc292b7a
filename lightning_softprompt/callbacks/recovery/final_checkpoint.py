"""The checkpoint to go on from: of the last validation, or of the last step."""

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
    """Saves after each validation, and at the step that `max_steps` names: from there a longer run goes on exactly.

    Lightning's own checkpoints are saved where the monitored metric is the best so far; a run that is killed would go
    on from there, one that ends between two validations would lose its last steps, and one that is shorter than the
    first would leave nothing. Where a validation falls on the last step, it is saved after that: a run that is killed
    in between must not go on without it. One that falls between the batches of a step, whose gradients no checkpoint
    has, is followed by a save after the step. A run that ends without any of this is saved at its end.

    Args:
        path: The file.
        keep: How many are kept: those before it as `last-1.ckpt` and so on.
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path = path
        self.names = [path, *(path.with_stem(f"{path.stem}-{n}") for n in range(1, keep))]
        self._step = 0  # at which the run began
        self._saved = False
        self._saved_step = 0  # of the last save
        self._due = False  # whether a validation fell between the batches of a step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on from its end takes no step, and leaves its checkpoint as it is."""
        self._step, self._saved, self._due = trainer.global_step, False, False
        self._saved_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within the epoch: at its end Lightning would count the rest of it as done."""
        ends = trainer.global_step == trainer.max_steps
        if (ends or self._due) and not _adds_up(trainer) and not self._is_validated(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves when the checkpoints before it, callbacks of the same kind, have seen the metric."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._due = _adds_up(trainer)
            if not self._due:
                self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was never validated, nor counted in steps."""
        if not self._saved and trainer.global_step > self._step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what a callback ends for want of its metric: it does so between two steps."""
        if lacks_metric(exception) and trainer.global_step > max(self._step, self._saved_step):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.path.exists():
            self._keep_earlier()
        trainer.save_checkpoint(self.path)
        self._saved, self._due, self._saved_step = True, False, trainer.global_step

    def _keep_earlier(self) -> None:
        """Counts on those that are there; the last one stays where it is until another takes its place."""
        for earlier, later in reversed(list(pairwise(self.names[1:]))):
            if earlier.exists():
                earlier.replace(later)
        for second in self.names[1:2]:
            write_file(second, self.path.read_bytes())

    @staticmethod
    def _is_validated(trainer: Trainer) -> bool:
        """Whether a validation follows this batch, which only the loop knows."""
        loop = trainer.fit_loop
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def lacks_metric(error: BaseException | None) -> bool:
    """Whether an error is that of a callback of Lightning whose metric is not there."""
    if not isinstance(error, RuntimeError | MisconfigurationException):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).name in ("early_stopping.py", "model_checkpoint.py")


def _adds_up(trainer: Trainer) -> bool:
    """Whether gradients are being added up, and the step is yet to come."""
    return trainer.fit_loop.epoch_loop._should_accumulate()
