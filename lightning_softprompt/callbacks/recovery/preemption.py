"""A run that is told to stop leaves a checkpoint from which it goes on bit by bit."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from lightning_softprompt.runs.loggers import rank_zero_info

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PREEMPTED, INTERRUPTED = 143, 130  # exit codes, as a shell tells SIGTERM and SIGINT


@final
class Preempted(SystemExit):
    """Ends a run whose checkpoint is written. Its code is that of the process: 143, or 130 after Ctrl-C."""


@final
class Preemption(Checkpoint):
    """Writes a checkpoint at the end of the step in which SIGTERM, SIGUSR1 or Ctrl-C came, and ends the run.

    The code is 143, or 130 after Ctrl-C; a second Ctrl-C stops at once. Processes agree on the step by asking each
    other after each one, over the CPU, so that no device waits; it does not matter which of them gets the signal. A
    signal that comes in a validation is heeded after the next step. The handlers of Lightning, which lose the run (or
    hang, where there are several processes), are not installed.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._code = self._stop = 0  # what this process heard, and what all agreed on
        self._before: dict[signal.Signals, Any] = {}
        self._group: distributed.ProcessGroup | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen before the backbone is loaded, which may take minutes."""
        self._code = self._stop = 0
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        """Remember only: whatever a handler does, it does in the middle of something else."""
        self._code = max(self._code, INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a way between the processes that does not go over their devices."""
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if any process was told to stop, unless gradients are still being added up."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._stop = self._agreed()
        if self._stop:
            trainer.save_checkpoint(self.path)
            step = trainer.global_step
            rank_zero_info(f"stopped at optimizer step {step}, as asked; to go on: --ckpt_path {self.path}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before anything else happens; by now the loggers have the values of the last step."""
        self._leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop; a resumed run leaves this validation out."""
        self._leave()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before other checkpoints are written."""
        self._leave()

    def _leave(self) -> None:
        if self._stop:
            raise Preempted(self._stop)

    def _agreed(self) -> int:
        if self._group is None:
            return self._code
        code = torch.tensor([self._code])
        distributed.all_reduce(code, distributed.ReduceOp.MAX, self._group)
        return int(code)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._group = {}, None


@final
class Termination(Callback):
    """Ends `validate`, `test` and `predict` at once when SIGTERM comes, with code 143.

    Predictions are written row by row, and the same command continues them, so there is nothing to finish first.
    """

    def __init__(self) -> None:
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's handler, which only takes note of the signal."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise Preempted(PREEMPTED)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the handler of the signal."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the handler of the signal."""
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
