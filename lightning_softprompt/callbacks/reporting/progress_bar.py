"""A progress bar over the whole training, with the learning rate and the latest validation metric."""

from __future__ import annotations

import math
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_softprompt.methods.optimizers import count_training_steps
from lightning_softprompt.system.printable import printable


@final
class StepProgressBar(RichProgressBar):
    """Shows optimizer steps out of all steps of the training; a training of unknown length has a bar per epoch.

    A resumed training starts at its step. Next to the bar are epoch, loss, learning rate and the latest value of the
    monitored metric.

    Args:
        monitor: The monitored metric of validation; None shows none.
        console: Options of rich's console.
    """

    def __init__(self, monitor: str | None = None, console: dict[str, Any] | None = None) -> None:
        super().__init__(console_kwargs=console)
        self.monitor = monitor
        self._steps: int | None = None  # of the training; None if unknown

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar at the current step."""
        super().on_train_start(trainer, pl_module)
        steps = count_training_steps(trainer)
        self._steps = None if steps is None or math.isinf(steps) else int(steps)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the bar of the previous epoch, unless there is one per epoch."""
        if self._steps is None:
            super().on_train_epoch_start(trainer, pl_module)
            return
        if self.is_enabled and self.progress is not None and self.train_progress_bar_id is None:
            self.train_progress_bar_id = self._add_task(self._steps, "Training")
            self.progress.reset(self.train_progress_bar_id, total=self._steps, completed=trainer.global_step)
        self.refresh()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        if self._steps is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns what is shown next to the bar."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the id of a logger
        if self._steps is not None:
            last = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
            metrics = {"epoch": f"{trainer.current_epoch + 1}{f'/{last}' if last else ''}", **metrics}
        if trainer.optimizers:
            metrics["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.2g}"
        if self.monitor in trainer.callback_metrics:
            metrics[self.monitor] = float(trainer.callback_metrics[self.monitor])
        return {printable(name): value for name, value in metrics.items()}
