"""No step is taken on numbers that are none: the rows are named, and the last good checkpoint stays the last."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_softprompt.callbacks.recovery.bad_rows import blamed
from lightning_softprompt.callbacks.recovery.resume import gathered
from lightning_softprompt.callbacks.reporting.prompt_watch import trainable
from lightning_softprompt.core.types import Batch
from lightning_softprompt.system.atomic_files import write_file

log = logging.getLogger(__name__)
SPIKE = 6.0  # deviations above the mean
WARM = 20  # steps before a loss can be a spike
MEMORY = 0.95  # of the running mean
TOLD = 10  # spikes of a run that are told of
SHOWN = 8  # rows that a message names


class NonFiniteError(ValueError):
    """A loss or a gradient is not finite."""


@dataclass(frozen=True)
class Judgement:
    """What is known of a step, once the device has got there.

    Args:
        values: [2] on the host: whether loss or gradient is not finite, and the loss.
        step: The optimizer step, the first being 1.
        batches: Its rows.
        event: On a GPU, what is recorded behind the copy of the values.
    """

    values: Tensor
    step: int
    batches: tuple[Batch, ...]
    event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, values: Tensor, step: int, batches: tuple[Batch, ...]) -> Self:
        """Has the values [2] copied, and does not wait for it."""
        if values.device.type != "cuda":
            return cls(values.cpu(), step, batches)
        host = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(host, step, batches, event)

    def read(self) -> tuple[bool, float]:
        """Whether the step is bad, and its loss; waits for this step alone."""
        if self.event is not None:
            self.event.synchronize()
        bad, loss = self.values.tolist()
        return bool(bad), loss


@final
class NumericGuard(Callback):
    """Stops a run at a loss or gradient that is not finite, or leaves the step out; names rows in `bad_rows.jsonl`.

    Nothing is trained on such a step, and no checkpoint written after it. The rows are found by running each of the
    step's alone. On a GPU nobody waits for the verdict: the gradient is made zero there, and the host reads it
    while the next step runs. A gradient that overflows in half precision is the scaler's business, as long as it can
    still lower its scale. Losses far above their running mean are told of.

    Args:
        path: Where the rows go.
        skip: How many steps in sequence may be left out, with optimizer and prompt as they were; 0 stops at the first.
            With it, each step waits for the device.
    """

    def __init__(self, path: Path, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f"skip must be at least 0, got {skip}")
        self.path, self.skip = Path(path), skip
        self.skipped = 0
        self._in_sequence = 0
        self._batches: list[Batch] = []
        self._loss: Tensor | None = None
        self._waiting: Judgement | None = None
        self._spikes = Spikes()

    def state_dict(self) -> dict[str, Any]:
        """What is known of losses and skipped steps."""
        return {"skipped": self.skipped, "in_sequence": self._in_sequence, "spikes": dict(vars(self._spikes))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self._in_sequence = state_dict["skipped"], state_dict["in_sequence"]
        vars(self._spikes).update(state_dict["spikes"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keep the rows till their step is judged."""
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add up the losses of a step; see what became of the step before."""
        self._settle(trainer, pl_module)
        loss = loss.detach().float()
        if (scaler := scaler_of(trainer)) is not None:
            loss = loss / scaler.get_scale()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step on its device; where that costs no waiting, or steps may be skipped, at once."""
        assert self._loss is not None, "an optimizer step without a loss"
        gradients = [p.grad for p in trainable(pl_module) if p.grad is not None]
        values = verdict(self._loss, [] if may_overflow(trainer) else gradients)
        if trainer.world_size > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
        self._waiting = Judgement.of(values, trainer.global_step + 1, tuple(self._batches))
        self._batches, self._loss = [], None
        if self._at_once(values.device):
            self._settle(trainer, pl_module)
            return
        for gradient in gradients:
            gradient.masked_fill_(values[0] > 0, 0)

    def _at_once(self, device: torch.device) -> bool:
        """Whether a verdict is waited for: it must be where the step may be left out, and costs nothing on a CPU."""
        return self.skip > 0 or device.type == "cpu"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """No checkpoint of a step that is not known to be good."""
        self._settle(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step, too."""
        self._settle(trainer, pl_module)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        judged, self._waiting = self._waiting, None
        if judged is None:
            return
        bad, loss = judged.read()
        if bad:
            self._refuse(trainer, pl_module, judged)
            return
        self._in_sequence = 0
        if self._spikes.take(loss) and self._spikes.told <= TOLD:
            log.warning(
                "at optimizer step %d the loss is %.4g, far above its running mean of %.4g; rows %s",
                judged.step, loss, self._spikes.mean, [n for batch in judged.batches for n in batch.global_row_ids],
            )  # fmt: skip

    def _refuse(self, trainer: Trainer, pl_module: LightningModule, judged: Judgement) -> None:
        records = self._write(trainer, pl_module, judged)
        self._in_sequence += 1
        if self._in_sequence > self.skip:
            self._stop(judged.step, records)
        self.skipped += 1
        for parameter in trainable(pl_module):
            parameter.grad = None  # so that no optimizer moves it, or what it keeps of it
        if trainer.is_global_zero:
            told = (
                f"optimizer step {judged.step} is left out, the {self._in_sequence}. in sequence, {self.skipped} in all"
            )
            log.warning("%s: loss or gradient is not finite on rows %s", told, shown(records))

    def _write(self, trainer: Trainer, pl_module: LightningModule, judged: Judgement) -> list[dict[str, Any]]:
        """The bad rows of all processes, added to the file as a whole."""
        with trainer.precision_plugin.train_step_context():
            own = [record for batch in judged.batches for record in blamed(pl_module, batch)]
        where = {"step": judged.step, "epoch": trainer.current_epoch}
        own = [{**record, **_place(trainer, record["row"])} for record in own]
        records = [{**where, **record} for of_rank in gathered(own) for record in of_rank]
        records = [record for record in records if not record["whole_batch"]] or records
        if trainer.is_global_zero:
            before = self.path.read_bytes() if self.path.is_file() else b""
            write_file(self.path, before + "".join(f"{json.dumps(record)}\n" for record in records).encode())
        return records

    def _stop(self, step: int, records: list[dict[str, Any]]) -> NoReturn:
        after = f", after {self.skip} steps that were left out" if self.skip else ""
        raise NonFiniteError(
            f"at optimizer step {step} loss or gradient is not finite{after}: rows {shown(records)}. They are in "
            f"{self.path}; the last checkpoint is of before. Look at them, lower the learning rate, set "
            "trainer.gradient_clip_val, or have such steps left out: --run.skip_bad_steps 3"
        )


@final
class Spikes:
    """A running mean and deviation of losses, and which of them are far above."""

    def __init__(self) -> None:
        self.seen, self.told, self.mean, self.variance = 0, 0, 0.0, 0.0

    def take(self, loss: float) -> bool:
        """Whether a loss is a spike; it counts for the mean only as much as the largest that is none."""
        highest = self.mean + SPIKE * math.sqrt(self.variance)
        spike = self.seen >= WARM and loss > highest
        off = (highest if spike else loss) - self.mean
        share = max(1 - MEMORY, 1 / (self.seen + 1))
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off * off)
        self.seen, self.told = self.seen + 1, self.told + spike
        return spike


def _place(trainer: Trainer, row: int) -> dict[str, str]:
    """File and line of a training row, if the data module knows them: rows are renumbered when some are left out."""
    find = getattr(trainer.datamodule, "where", None)  # type: ignore[attr-defined]
    return {} if find is None else {"where": find("train", row)}


def verdict(loss: Tensor, gradients: list[Tensor]) -> Tensor:
    """[2] whether loss or gradients are not finite, and the loss, on their device."""
    good = torch.isfinite(loss)
    if gradients:
        good = good & torch.isfinite(get_total_norm(gradients)).to(loss.device)
    return torch.stack([(~good).float(), loss.nan_to_num(0.0, 0.0, 0.0)])


def scaler_of(trainer: Trainer) -> Any:
    """What scales losses in half precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def may_overflow(trainer: Trainer) -> bool:
    """Whether a gradient that is not finite is only one that was scaled too far, which the scaler mends."""
    scaler = scaler_of(trainer)
    return scaler is not None and scaler.get_scale() > 1


def shown(records: list[dict[str, Any]]) -> str:
    """Rows, the first of them with their text."""
    rows = [f"{record.get('where', record['row'])} ({record['text'][:60]!r})" for record in records[:SHOWN]]
    more = f" and {len(records) - SHOWN} more" if len(records) > SHOWN else ""
    return ", ".join(rows) + more
