"""Saves a checkpoint for an exact resume when a run receives a stop signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from lightning_softprompt.runs.loggers import rank_zero_info

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PREEMPTED, INTERRUPTED = 143, 130  # exit codes, as a shell reports SIGTERM and SIGINT


@final
class Preempted(SystemExit):
    """Ends a run after its checkpoint is written. Its code is the exit code: 143, or 130 after Ctrl-C."""


class SignalCallback(Callback):
    """Replaces the signal handlers of the process during a run. Lightning's own are not installed."""

    _previous: Mapping[signal.Signals, Any] = {}

    def _install(self, trainer: Trainer, signals: Iterable[signal.Signals], handler: Callable[..., None]) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, handler) for number in signals}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous handlers."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@final
class Preemption(SignalCallback, Checkpoint):
    """Saves a checkpoint at the end of the step in which SIGTERM, SIGUSR1 or Ctrl-C arrives, and ends the run.

    The exit code is 143, or 130 after Ctrl-C; a second Ctrl-C stops immediately. Processes agree on the step with an
    all-reduce on the CPU after each step, so that no device waits; any of them may receive the signal. A signal during
    a validation takes effect after the next step. Lightning's signal handlers are not installed: they lose the run, or
    hang with several processes.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._code = self._stop = 0  # exit code of this process, and that agreed on by all
        self._group: distributed.ProcessGroup | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the handlers before the backbone is loaded, which may take minutes."""
        self._code = self._stop = 0
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._install(trainer, SIGNALS, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Only set the exit code, because a handler may interrupt any operation."""
        self._code = max(self._code, INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create a process group for the CPU."""
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if any process received a signal, unless gradients are still being accumulated."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._stop = self._agree()
        if self._stop:
            trainer.save_checkpoint(self.path)
            step = trainer.global_step
            rank_zero_info(f"Stopped at optimizer step {step} by a signal. To resume: --ckpt_path {self.path}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the next batch; the loggers have the values of the last step."""
        self._leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop; a resumed run omits this validation."""
        self._leave()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before other checkpoints are written."""
        self._leave()

    def _leave(self) -> None:
        if self._stop:
            raise Preempted(self._stop)

    def _agree(self) -> int:
        if self._group is None:
            return self._code
        code = torch.tensor([self._code])
        distributed.all_reduce(code, distributed.ReduceOp.MAX, self._group)
        return int(code)

    def _restore(self) -> None:
        super()._restore()
        self._group = None


@final
class Termination(SignalCallback):
    """Ends `validate`, `test` and `predict` at once when SIGTERM arrives, with code 143.

    Predictions are written row by row, and the same command continues them, so there is nothing to finish first.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's handler, which only records the signal."""
        self._command = stage
        self._install(trainer, [signal.SIGTERM], self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        continues = "the same command continues the predictions" if self._command == "predict" else "run it again"
        rank_zero_info(f"Stopped by SIGTERM; {continues}")
        raise Preempted(PREEMPTED)
