"""What a training works on and how long it takes, in a few lines at its start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, cast, final

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.recovery.final_validation import count_training_batches, count_validations
from lightning_softprompt.core.types import Batch
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.methods.optimizers import count_training_steps
from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.system.durations import describe_seconds

TIMED_BATCHES = 5  # after the first one, which also sets up the execution path
MAX_CLASSES = 8  # whose shares are listed


@final
class StartSummary(Callback):
    """Logs rows per split, class balance, tokens per row, length and learning rate; after a few batches the time left.

    The time of validations is known after the first one. The time left is then logged again.

    Args:
        write: Logs a line once for all processes.
    """

    def __init__(self, write: Callable[[str], None] = rank_zero_info) -> None:
        self._write = write
        self._timed_batches = 0
        self._timer_start = 0.0  # end of the first batch, later by the time of validations since then
        self._validation_start = 0.0
        self._seconds_per_validation: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is known before the first step."""
        self._timed_batches, self._seconds_per_validation = -1, None
        data = cast(SoftPromptDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        training = data.split("train")
        rows = f"{len(training):,} train"
        if trainer.limit_val_batches != 0:
            rows += f" and {len(data.split('validation')):,} validation"
        balance = describe_balance(data, training)
        self._write(f"Data: {rows} rows{balance}")
        if isinstance(training, PreparedRows):
            self._write(describe_lengths(training.sample, data.max_tokens))
        self._write(describe_training(trainer))
        if trainer.enable_validation:
            self._write(describe_validations(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log the time left after a few batches."""
        self._timed_batches += 1
        if self._timed_batches == 0:
            self._timer_start = perf_counter()
        elif self._timed_batches == TIMED_BATCHES:
            self._write_time_left(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._validation_start = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time left after the first validation."""
        seconds = perf_counter() - self._validation_start
        self._timer_start += seconds
        if self._seconds_per_validation is None and not trainer.sanity_checking:
            self._seconds_per_validation = seconds
            is_estimated = self._timed_batches >= TIMED_BATCHES  # otherwise, on_train_batch_end logs it
            if is_estimated and _count_remaining_validations(trainer):
                self._write_time_left(trainer)

    def _write_time_left(self, trainer: Trainer) -> None:
        batches = count_training_batches(trainer)
        num_done = trainer.fit_loop.total_batch_idx + 1
        if batches is None or batches <= num_done:
            return
        seconds_per_batch = (perf_counter() - self._timer_start) / self._timed_batches
        seconds = seconds_per_batch * (batches - num_done)
        num_validations = _count_remaining_validations(trainer)
        validations = ""
        if self._seconds_per_validation is None:
            validations = ", without validations" if trainer.enable_validation else ""
        elif num_validations:
            seconds += self._seconds_per_validation * num_validations
            noun = "validation" if num_validations == 1 else "validations"
            each = describe_seconds(self._seconds_per_validation)
            validations = f", with {num_validations} more {noun} of {each}"
        seconds_per_step = seconds_per_batch * trainer.accumulate_grad_batches
        left = describe_seconds(seconds)
        self._write(f"Time left: {left} ({seconds_per_step:.2g} s per step){validations}")


def _count_remaining_validations(trainer: Trainer) -> int:
    batches = count_training_batches(trainer)
    if batches is None:
        return 0
    return count_validations(trainer, batches) - count_validations(trainer, trainer.fit_loop.total_batch_idx + 1)


def describe_balance(data: SoftPromptDataModule, rows: PreparedRows) -> str:
    """Describes the share of each class of a task with classes; otherwise empty."""
    has_labels = data.classes is not None and isinstance(rows, PreparedRows)
    labels = [example.label for example in rows.examples] if has_labels else []
    names = () if data.classes is None else data.classes.names
    if not names or not labels or not all(isinstance(label, int) for label in labels):
        return ""
    shares = []
    counts = Counter(cast(Sequence[int], labels))
    for label, count in counts.most_common(MAX_CLASSES):
        share = count / len(labels)
        shares.append(f"{names[label]} {share:.0%}")
    num_more = len(names) - len(shares)
    more = f" and {num_more} more classes" if num_more > 0 else ""
    return f"; {', '.join(shares)}{more}"


def describe_lengths(rows: PreparedRows, max_tokens: int) -> str:
    """Describes the numbers of tokens of the rows of a split, without soft tokens."""
    median, high, longest = np.percentile(rows.lengths, [50, 95, 100])
    truncated = sum(row.num_truncated > 0 for row in rows.encoded) / len(rows)
    return (
        f"Tokens per training row: median {median:.0f}, 95 % up to {high:.0f}, maximum {longest:.0f}; "
        f"{truncated:.1%} truncated to max_tokens={max_tokens}"
    )


def describe_training(trainer: Trainer) -> str:
    """Describes optimizer, learning rate and length of a training."""
    (optimizer,) = trainer.optimizers
    groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
    initial_rates = [group.get("initial_lr", group["lr"]) for group in groups]
    rates = " and ".join(dict.fromkeys(f"{rate:.2g}" for rate in initial_rates))
    schedules = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    schedule = f" with {schedules[0]}" if schedules else ""
    total = count_training_steps(trainer)
    batches = trainer.num_training_batches
    length = "an unlimited number of steps"
    if total is not None and not math.isinf(total):
        epochs = ""
        if batches and not math.isinf(batches):
            steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
            epochs = f", {total / steps_per_epoch:.3g} epochs"
        length = f"{int(total):,} steps{epochs}"
    return f"Training: {length}, {type(optimizer).__name__}, learning rate {rates}{schedule}"


def describe_validations(trainer: Trainer) -> str:
    """Describes when a training validates."""
    every, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    total = count_training_batches(trainer)
    if batches is None:
        return "Validation: at the time interval of val_check_interval"
    if math.isinf(batches):
        return "Validation: at the end of each pass over the training rows"
    if total is not None and batches == total:
        return "Validation: after the last step"
    if every is None or batches != trainer.num_training_batches:
        steps = batches / trainer.accumulate_grad_batches
        return f"Validation: every {steps:.3g} steps"
    return "Validation: after each epoch" if every == 1 else f"Validation: every {every} epochs"
