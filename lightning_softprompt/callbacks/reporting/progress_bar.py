"""Progress of a training: a bar on a terminal, and lines in a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn, MetricsTextColumn
from rich import get_console, reconfigure

from lightning_softprompt.callbacks.reporting.notebook_display import NotebookProgress
from lightning_softprompt.methods.optimizers import count_training_steps
from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.system.durations import describe_seconds
from lightning_softprompt.system.printable import printable

METRICS_WIDTH = 110  # characters of a line without the bar itself, with the metrics
NOTEBOOK_WIDTH = 130  # characters of a line in a notebook, which scrolls sideways
MIN_BAR, MAX_BAR = 8, 40  # characters; a narrower bar is left out
LINE_INTERVAL = 60.0  # seconds between two lines of a training whose output is not a terminal


@final
class StepProgressBar(RichProgressBar):
    """Shows optimizer steps out of all steps of the training; a training of unknown length has a bar per epoch.

    A resumed training starts at its step. Next to the bar are epoch, loss, learning rate and the latest value of the
    monitored metric. If the output is a file or a pipe, a line is logged after each validation and once a minute
    instead.

    Args:
        monitor: The monitored metric of validation; None shows none.
        console: Options of rich's console.
        write: Logs a line once for all processes.
    """

    def __init__(
        self,
        monitor: str | None = None,
        console: dict[str, Any] | None = None,
        write: Callable[[str], None] = rank_zero_info,
    ) -> None:
        super().__init__(console_kwargs=console)
        self.monitor = monitor
        self._write = write
        self._writes_lines = False
        self._steps: int | None = None  # of the training; None if unknown
        self._first_step = 0  # of this start
        self._started = self._last_line = 0.0  # times in seconds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the bar with lines if the output is not a terminal or a notebook."""
        console = get_console()
        if not (console.is_terminal or console.is_jupyter):
            self._writes_lines = True
            self.disable()
        super().setup(trainer, pl_module, stage)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Returns the columns of the line: the bar is as wide as the terminal allows, so that the metrics fit."""
        columns = super().configure_columns(trainer)
        width = min(get_console().width - METRICS_WIDTH, MAX_BAR)
        if width < MIN_BAR:
            return [column for column in columns if not isinstance(column, CustomBarColumn)]
        for column in columns:
            if isinstance(column, CustomBarColumn):
                column.bar_width = width
        return columns

    def _init_progress(self, trainer: Trainer) -> None:
        """Start the display; a notebook has one without widgets."""
        has_display = self.progress is not None and not self._progress_stopped
        if not get_console().is_jupyter or not self.is_enabled or has_display:
            super()._init_progress(trainer)
            return
        self._reset_progress_bar_ids()
        reconfigure(**{"width": NOTEBOOK_WIDTH, **self._console_kwargs})
        self._console = get_console()
        theme = self.theme
        self._metric_component = MetricsTextColumn(
            trainer, theme.metrics, theme.metrics_text_delimiter, theme.metrics_format
        )
        columns = [*self.configure_columns(trainer), self._metric_component]
        self.progress = NotebookProgress(*columns, refresh_per_second=self.refresh_rate, console=self._console)
        self.progress.start()
        self._progress_stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar at the current step."""
        super().on_train_start(trainer, pl_module)
        steps = count_training_steps(trainer)
        self._steps = None if steps is None or math.isinf(steps) else int(steps)
        self._first_step = trainer.global_step
        self._started = self._last_line = perf_counter()

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
        if self._writes_lines:
            if perf_counter() - self._last_line >= LINE_INTERVAL:
                self._write_line(trainer, pl_module)
            return
        if self._steps is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new value of the monitored metric."""
        super().on_validation_end(trainer, pl_module)
        if self._writes_lines and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_line(trainer, pl_module)

    def _write_line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the current step, the metrics and the time left."""
        self._last_line = perf_counter()
        step = trainer.global_step
        position = f"Step {step}" if self._steps is None else f"Step {step} of {self._steps}"
        values = []
        for name, value in self.get_metrics(trainer, pl_module).items():
            values.append(f"{name} {value if isinstance(value, str) else format(value, '.3f')}")
        line = f"{position}: {', '.join(values)}"
        if self._steps is not None and self._first_step < step < self._steps:
            seconds_per_step = (self._last_line - self._started) / (step - self._first_step)
            line += f"; {describe_seconds(seconds_per_step * (self._steps - step))} left"
        self._write(line)

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
