"""Learning rates that depend on the length of the training: linear warmup, then a constant rate or a decay to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Decay = Literal["constant", "linear", "cosine"]


def make_warmup_schedule(decay: Decay, warmup: float) -> WarmupSchedule | None:
    """Returns the schedule; None if the learning rate never changes."""
    schedule = WarmupSchedule(decay, warmup)
    return None if decay == "constant" and not warmup else schedule


@final
@dataclass(frozen=True)
class WarmupSchedule:
    """Linear warmup from zero, then a constant rate or a decay to zero at the last step of the training.

    Args:
        decay: `constant`, `linear`, or `cosine` (half a period).
        warmup: Number of warmup steps, or their share of the training if below 1.

    Raises:
        ValueError: If `warmup` is negative, not finite, or neither a share nor a whole number of steps.
    """

    decay: Decay
    warmup: float = 0.0

    def __post_init__(self) -> None:
        is_share = 0 <= self.warmup < 1
        is_number_of_steps = self.warmup >= 1 and math.isfinite(self.warmup) and self.warmup == int(self.warmup)
        if not (is_share or is_number_of_steps):
            raise ValueError(
                f"warmup must be a whole number of steps, or a share of the training below 1, got {self.warmup}"
            )

    @property
    def needs_length(self) -> bool:
        """Whether the schedule depends on the number of training steps."""
        return self.decay != "constant" or 0 < self.warmup < 1

    def build(self, optimizer: Optimizer, steps: float | None) -> LambdaLR:
        """Creates the schedule of an optimizer.

        Args:
            optimizer: The optimizer.
            steps: Number of training steps; infinite if unbounded, None if unknown.

        Raises:
            ValueError: If the schedule requires a number of steps that is unknown, or warmup takes all of them.
        """
        length = None if steps is None or math.isinf(steps) else int(steps)
        if self.needs_length and length is None:
            option = f"lr_schedule {self.decay}" if self.decay != "constant" else f"warmup {self.warmup}"
            raise ValueError(
                f"{option} requires a known number of training steps; set --trainer.max_steps or --trainer.max_epochs"
            )
        warmup_steps = round(self.warmup * (length or 0)) if self.warmup < 1 else int(self.warmup)
        # a run of 0 steps, whose result is that of a callback, does not use the schedule
        if self.decay != "constant" and length and warmup_steps >= length:
            raise ValueError(f"warmup takes {warmup_steps} steps, but the training has {length}; lower --model.warmup")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            if self.decay == "constant" or not length:
                return 1.0
            progress = min(1.0, (step - warmup_steps) / (length - warmup_steps))
            return 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

        return LambdaLR(optimizer, factor)
