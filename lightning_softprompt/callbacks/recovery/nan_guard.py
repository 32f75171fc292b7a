"""Skips or stops at steps with a non-finite loss or gradient, and reports the rows that cause it."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self, cast, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_softprompt.callbacks.recovery.bad_rows import find_nonfinite_rows
from lightning_softprompt.core.types import Batch
from lightning_softprompt.distributed.collectives import gather_objects
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.methods.trainer_hooks import TrainerHooks
from lightning_softprompt.system.atomic_files import write_file

log = logging.getLogger(__name__)
SPIKE = 6.0  # standard deviations above the mean
WARMUP = 20  # steps before a loss can be a spike
DECAY = 0.95  # of the running mean
MAX_REPORTED = 10  # spikes of a run that are logged
MAX_LISTED = 8  # rows in a message
Rows = tuple[Batch, ...]  # what each method learns from in a batch


class NonFiniteError(ValueError):
    """A loss or a gradient is not finite."""


@dataclass(frozen=True)
class StepCheck:
    """The result of checking a step, available once the device has computed it.

    Args:
        values: [2] on the host: whether loss or gradient is non-finite, and the loss.
        step: The optimizer step, starting at 1.
        batches: The rows of each method in each batch of the step.
        event: On a GPU, the event recorded after the copy of the values.
    """

    values: Tensor
    step: int
    batches: tuple[Rows, ...]
    event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, values: Tensor, step: int, batches: tuple[Rows, ...]) -> Self:
        """Copy the values [2] to the host without waiting for the device."""
        if values.device.type != "cuda":
            return cls(values.cpu(), step, batches)
        host = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(host, step, batches, event)

    def read(self) -> tuple[bool, float]:
        """Whether the step is non-finite, and its loss; waits for this step only."""
        if self.event is not None:
            self.event.synchronize()
        bad, loss = self.values.tolist()
        return bool(bad), loss


@final
class NumericGuard(Callback):
    """Stops a run at a non-finite loss or gradient, or skips the step; writes the rows to `bad_rows.jsonl`.

    Such a step does not change the prompt, and no checkpoint is written after it. The rows are identified by running
    each row of the step alone. On a GPU, the host does not wait for the check: the device sets the gradient to zero,
    and the host reads the result while the next step runs. Overflowing gradients in half precision are left to the
    gradient scaler as long as it can lower its scale. Losses far above their running mean are logged.

    Args:
        path: The file of the rows.
        skip: Number of consecutive steps that may be skipped, without a change of prompt and optimizer; 0 stops at
            the first. If it is above 0, each step waits for the device.
    """

    def __init__(self, path: Path, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f"skip must be at least 0, got {skip}")
        self.path, self.skip = Path(path), skip
        self.skipped = 0
        self._in_sequence = 0
        self._batches: list[Rows] = []
        self._loss: Tensor | None = None
        self._pending: StepCheck | None = None
        self._spikes = SpikeDetector()

    def state_dict(self) -> dict[str, Any]:
        """The counts of skipped steps and the statistics of losses."""
        return {"skipped": self.skipped, "in_sequence": self._in_sequence, "spikes": self._spikes.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts and statistics."""
        self.skipped, self._in_sequence = state_dict["skipped"], state_dict["in_sequence"]
        self._spikes.load_state_dict(state_dict["spikes"])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sum the losses of a step and keep its rows until it is checked; resolve the check of the previous step."""
        self._resolve(trainer, pl_module)
        self._batches.append(tuple(cast(TrainerHooks, pl_module).step_rows))
        loss = loss.detach().float()
        if (scaler := scaler_of(trainer)) is not None:
            loss = loss / scaler.get_scale()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the step on its device; resolve the check now if that needs no waiting or steps may be skipped."""
        assert self._loss is not None, "an optimizer step without a loss"
        gradients = [p.grad for p in trainable_parameters(pl_module).values() if p.grad is not None]
        values = check_finite(self._loss, [] if may_overflow(trainer) else gradients)
        if trainer.world_size > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
        self._pending = StepCheck.of(values, trainer.global_step + 1, tuple(self._batches))
        self._batches, self._loss = [], None
        if self._is_immediate(values.device):
            self._resolve(trainer, pl_module)
            return
        for gradient in gradients:
            gradient.masked_fill_(values[0] > 0, 0)

    def _is_immediate(self, device: torch.device) -> bool:
        """Whether to wait for the check: required if the step may be skipped, and free on a CPU."""
        return self.skip > 0 or device.type == "cpu"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resolve the check first, so that no checkpoint contains a non-finite step."""
        self._resolve(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the check of the last step."""
        self._resolve(trainer, pl_module)

    def _resolve(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check, self._pending = self._pending, None
        if check is None:
            return
        is_bad, loss = check.read()
        if is_bad:
            self._skip_or_stop(trainer, pl_module, check)
            return
        self._in_sequence = 0
        if self._spikes.update(loss) and self._spikes.count <= MAX_REPORTED:
            rows = [row for batch in check.batches for row in batch[0].global_row_ids]
            log.warning(
                "Optimizer step %d: loss %.4g is far above its running mean %.4g; rows %s",
                check.step, loss, self._spikes.mean, rows,
            )  # fmt: skip

    def _skip_or_stop(self, trainer: Trainer, pl_module: LightningModule, check: StepCheck) -> None:
        records = self._write(trainer, pl_module, check)
        self._in_sequence += 1
        if self._in_sequence > self.skip:
            self._stop(check.step, records)
        self.skipped += 1
        for parameter in trainable_parameters(pl_module).values():
            parameter.grad = None  # so that the optimizer changes neither it nor its state
        if trainer.is_global_zero:
            log.warning(
                "Skipped optimizer step %d (%d consecutive, %d in total): loss or gradient is not finite on rows %s",
                check.step, self._in_sequence, self.skipped, format_rows(records),
            )  # fmt: skip

    def _write(self, trainer: Trainer, pl_module: LightningModule, check: StepCheck) -> list[dict[str, Any]]:
        """Append the bad rows of all processes to the file, atomically."""
        local = []
        with trainer.precision_plugin.train_step_context():
            for batch in check.batches:
                local.extend(find_nonfinite_rows(pl_module, *batch))
        local = [{**record, **_location(trainer, record["row"])} for record in local]
        step = {"step": check.step, "epoch": trainer.current_epoch}
        records = [{**step, **record} for part in gather_objects(local) for record in part]
        records = [record for record in records if not record["whole_batch"]] or records
        if trainer.is_global_zero:
            earlier = self.path.read_bytes() if self.path.is_file() else b""
            lines = "".join(f"{json.dumps(record)}\n" for record in records)
            write_file(self.path, earlier + lines.encode())
        return records

    def _stop(self, step: int, records: list[dict[str, Any]]) -> NoReturn:
        after = f", after {self.skip} skipped steps" if self.skip else ""
        raise NonFiniteError(
            f"at optimizer step {step} loss or gradient is not finite{after}: rows {format_rows(records)}. They are "
            f"written to {self.path}; the last checkpoint precedes this step. Inspect the rows, lower the learning "
            "rate, set trainer.gradient_clip_val, or skip such steps: --run.skip_bad_steps 3"
        )


@final
class SpikeDetector:
    """Detects losses far above their running mean.

    Attributes:
        steps: Number of losses.
        count: Number of spikes.
        mean: The running mean.
        variance: The running variance.
    """

    def __init__(self) -> None:
        self.steps, self.count, self.mean, self.variance = 0, 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The statistics, under the keys of checkpoints."""
        return {"seen": self.steps, "told": self.count, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics."""
        self.steps, self.count = state["seen"], state["told"]
        self.mean, self.variance = state["mean"], state["variance"]

    def update(self, loss: float) -> bool:
        """Add a loss and return whether it is a spike; the running mean uses spikes clipped to the threshold."""
        threshold = self.mean + SPIKE * math.sqrt(self.variance)
        is_spike = self.steps >= WARMUP and loss > threshold
        deviation = (threshold if is_spike else loss) - self.mean
        rate = max(1 - DECAY, 1 / (self.steps + 1))
        self.mean += rate * deviation
        self.variance = (1 - rate) * (self.variance + rate * deviation * deviation)
        self.steps += 1
        self.count += is_spike
        return is_spike


def _location(trainer: Trainer, row: int) -> dict[str, str]:
    """File and line of a training row, if the data module knows them; skipped rows change the row numbers."""
    find = getattr(trainer.datamodule, "where", None)  # type: ignore[attr-defined]
    return {} if find is None else {"where": find("train", row)}


def check_finite(loss: Tensor, gradients: list[Tensor]) -> Tensor:
    """[2] whether loss or gradients are non-finite, and the loss, on their device."""
    good = torch.isfinite(loss)
    if gradients:
        good = good & torch.isfinite(get_total_norm(gradients)).to(loss.device)
    return torch.stack([(~good).float(), loss.nan_to_num(0.0, 0.0, 0.0)])


def scaler_of(trainer: Trainer) -> Any:
    """The gradient scaler of half precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def may_overflow(trainer: Trainer) -> bool:
    """Whether a non-finite gradient may be an overflow that the scaler corrects by lowering its scale."""
    scaler = scaler_of(trainer)
    return scaler is not None and scaler.get_scale() > 1


def format_rows(records: list[dict[str, Any]]) -> str:
    """The first rows with their text, and the number of further ones."""
    rows = []
    for record in records[:MAX_LISTED]:
        location = record.get("where", record["row"])
        rows.append(f"{location} ({record['text'][:60]!r})")
    more = f" and {len(records) - MAX_LISTED} more" if len(records) > MAX_LISTED else ""
    return ", ".join(rows) + more
