"""Baby steps: buckets of rows from easy to hard, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from lightning_softprompt.data.curricula.base import DifficultyCurriculum
from lightning_softprompt.data.sampling.row_order import WINDOW, Indices, Pool, Position


@final
@dataclass(frozen=True)
class BabySteps(DifficultyCurriculum):
    """Divides rows into buckets of equal size and trains on one after the other (Bengio 2009; Spitkovsky et al. 2010).

    After the last bucket, training uses the plain shuffled order from the next epoch on.

    Args:
        difficulty: Scores the rows.
        reverse: Whether to use difficult rows first, as a control.
        buckets: Number of buckets.
        steps: Batches of each bucket (default: all buckets together take one epoch).
        cumulative: Whether a bucket is added to the easier ones, instead of replacing them.

    Raises:
        ValueError: If there are no buckets or steps.
    """

    buckets: int = 4
    steps: int | None = None
    cumulative: bool = True

    def __post_init__(self) -> None:
        if self.buckets < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"buckets and steps must be at least 1, got {self.buckets} and {self.steps}")

    def _steps(self, position: Position) -> int:
        return self.steps or max(1, -(-position.batches // self.buckets))

    def is_complete(self, position: Position) -> bool:
        """Whether all buckets were used."""
        return position.step >= self.buckets * self._steps(position)

    def pool(self, ranked: Indices, position: Position) -> Pool:
        """Returns the rows of the bucket at a position, and of the easier ones if `cumulative`."""
        if self.is_complete(position):
            return Pool(ranked, WINDOW)
        stage, done = divmod(position.step, self._steps(position))
        buckets = np.array_split(ranked, self.buckets)
        rows = np.concatenate(buckets[: stage + 1]) if self.cumulative else buckets[stage]
        return Pool(rows, min(WINDOW, self._steps(position) - done))
