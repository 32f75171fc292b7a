"""One pass from easy to hard rows in each epoch, and its reverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_softprompt.data.curricula.base import DifficultyCurriculum
from lightning_softprompt.data.sampling.row_order import Indices, Pool, Position, window_size


@final
@dataclass(frozen=True)
class EasyToHard(DifficultyCurriculum):
    """Uses each row once per epoch, the easiest first; with `reverse` the most difficult first (anti-curriculum).

    Rows are mixed within windows of batches, a twentieth of the epoch.

    Args:
        difficulty: Scores the rows.
        reverse: Whether to use difficult rows first.
        epochs: Epochs in this order, after which the order is shuffled (default: all epochs).

    Raises:
        ValueError: If there are no epochs.
    """

    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    def is_complete(self, position: Position) -> bool:
        """Whether the epochs of this order are over."""
        return self.epochs is not None and position.epoch >= self.epochs

    def pool(self, ranked: Indices, position: Position) -> Pool:
        """Returns exactly the rows of the next window."""
        steps = window_size(position.batches)
        begin = position.batch * position.rows_per_step
        return Pool(ranked[begin : begin + steps * position.rows_per_step], steps)
