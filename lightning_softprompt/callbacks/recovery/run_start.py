"""Creates the files of a run only after every check that precedes its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.optimizers import count_training_steps, refuse_changed_state
from lightning_softprompt.runs.run_checks import refuse_early_copies


@final
class RunStart(Callback):
    """Calls a function once, after the rows are read, the backbone is loaded and the optimizer is created.

    It is the first callback of a run. Lightning opens loggers before it reads the rows, so they start disabled.

    Args:
        begin: Creates the run's folder and enables its loggers.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._begun = False

    def _once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._begun:
            with trainer.precision_plugin.forward_context():
                cast(SoftPromptModule, pl_module).check_prompt()
            self._begun = True
            self._begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin before the first step of a training.

        Raises:
            ValueError: If a callback has a copy of the module that lacks the prompt, the schedule ends too early, the
                prompt never fits, or a weight is of a penalty that the method does not report.
        """
        if trainer.ckpt_path is not None and trainer.global_step:
            refuse_changed_state(trainer.optimizers, str(trainer.ckpt_path))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        cast(SoftPromptModule, pl_module).try_schedule(groups, count_training_steps(trainer))
        refuse_early_copies(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
        self._once(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin if a training has no step left."""
        self._once(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin `validate`; validations within a training come later than its start."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._once(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin `test`."""
        self._once(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin `predict`."""
        self._once(trainer, pl_module)
