"""When a run begins to leave files: after all that can be refused before its first step was checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


@final
class RunStart(Callback):
    """Calls a function once, when the rows are read, the backbone is loaded and the optimizer is made.

    It is the first callback of a run. Lightning opens loggers before it reads the rows, so loggers wait for it.

    Args:
        begin: Makes the run's folder and lets its loggers write.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._begun = False

    def _once(self) -> None:
        if not self._begun:
            self._begun = True
            self._begin()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training begins."""
        self._once()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation begins; within a training this comes later than its start."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._once()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A test begins."""
        self._once()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A prediction begins."""
        self._once()
