"""Speed, memory and number of tokens of a training."""

from __future__ import annotations

import resource
import sys
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_softprompt.core.types import Batch
from lightning_softprompt.distributed.collectives import gather_objects
from lightning_softprompt.runs.loggers import is_logging_step


class Throughput(Callback):
    """Logs `speed/tokens_per_s`, `speed/step_ms`, `speed/memory_mb` and `train/tokens` on logging steps.

    Speeds cover the steps since the last logging step, including the time that they wait for data, but not validations
    and the checkpoints that follow them. Tokens are input tokens without padding; each process is assumed to have as
    many as the first one. Memory is the peak of the run so far, of the GPU if there is one, else of the process.
    `train/tokens` is the number of tokens since the start of the training, also in a resumed run: curricula that begin
    with short rows take more steps for the same number of tokens, so their losses are compared over tokens.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0  # a tensor on the batch's device: reading it would synchronize
        self._total: Tensor | int = 0  # tokens of this process
        self._earlier = 0  # tokens of all processes before the training was resumed
        self._seconds = 0.0
        self._since: float | None = None  # None while the clock is stopped
        self._step = 0  # the optimizer step at which the count started

    def state_dict(self) -> dict[str, Any]:
        """The number of tokens of the training. A collective operation: every process must call it, as on saving."""
        return {"tokens": self._earlier + sum(gather_objects(int(self._total)))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to count."""
        self._earlier, self._total = state_dict["tokens"], 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count, in a resumed run at its step."""
        self._begin(trainer.global_step)
        self._since = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Start the clock."""
        if self._since is None:
            self._since = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch; log on logging steps, once for all batches of an accumulated step."""
        tokens = batch.mask.sum()
        self._tokens, self._total = self._tokens + tokens, self._total + tokens
        step = trainer.global_step
        if step > self._step and is_logging_step(trainer, step):
            self._stop(pl_module.device)
            pl_module.log_dict(self._speeds(trainer, pl_module.device), batch_size=len(batch))
            self._begin(step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next training batch."""
        self._stop(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next training batch."""
        self._stop(pl_module.device)

    def _begin(self, step: int) -> None:
        self._tokens, self._seconds, self._step = 0, 0.0, step
        self._since = perf_counter()

    def _stop(self, device: torch.device) -> None:
        if self._since is None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += perf_counter() - self._since
        self._since = None

    def _speeds(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        return {
            "speed/tokens_per_s": int(self._tokens) * trainer.world_size / self._seconds,
            "speed/step_ms": 1000 * self._seconds / (trainer.global_step - self._step),
            "speed/memory_mb": peak_memory(device) / 2**20,
            "train/tokens": float(self._earlier + sum(gather_objects(int(self._total)))),
        }


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: of the GPU, or of the process if there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes
