"""The contract of curricula, and the order of rows by difficulty that most of them share."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np

from lightning_softprompt.data.difficulty.base import Difficulty, ScoringModel
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.sampling.row_order import Indices, Pool, Position, RowOrder


@dataclass(frozen=True)
class RowPlan:
    """How a sampler draws training rows.

    Args:
        order: Chooses the rows of each step; None for the shuffled order.
        weights: Sampling weight of each row; None to use each row once per epoch.
    """

    order: RowOrder | None = None
    weights: list[float] | None = None


class Curriculum(ABC):
    """Which training rows are used at which step, or how often. It changes neither rows nor loss."""

    uses_trained_model = False  # whether the order depends on the state of the training

    @abstractmethod
    def plan(self, rows: PreparedRows, model: ScoringModel) -> RowPlan:
        """Returns how the sampler draws the rows.

        Args:
            rows: The training rows.
            model: Measures losses of rows.
        """


@dataclass(frozen=True)
class DifficultyCurriculum(Curriculum):
    """A curriculum by the difficulty of rows, which is measured once.

    Args:
        difficulty: Scores the rows; a higher score is more difficult.
        reverse: Whether to use difficult rows first, as a control.
    """

    difficulty: Difficulty
    reverse: bool = False

    @final
    def plan(self, rows: PreparedRows, model: ScoringModel) -> RowPlan:
        """Returns an order by difficulty."""
        return RowPlan(OrderByDifficulty(self, lambda: rank_rows(self.difficulty.scores(rows, model), self.reverse)))

    @abstractmethod
    def is_complete(self, position: Position) -> bool:
        """Whether the curriculum is over at a position: from there on, training uses the plain shuffled order."""

    @abstractmethod
    def pool(self, ranked: Indices, position: Position) -> Pool:
        """Returns the rows from which the steps from a position on draw.

        Args:
            ranked: The usable rows, the first ones of the curriculum first.
            position: The position of the first of these steps.
        """


@final
class OrderByDifficulty(RowOrder):
    """The order of a curriculum by difficulty.

    Args:
        curriculum: The curriculum.
        rank: Returns the rows in the order of the curriculum. It is called when the first batch is requested, because
            it may need the loaded model.
    """

    def __init__(self, curriculum: DifficultyCurriculum, rank: Callable[[], Indices]) -> None:
        self.curriculum, self._rank = curriculum, rank

    @cached_property
    def _ranked(self) -> Indices:
        return self._rank()

    def ranked(self, epoch: int) -> Indices:
        """Returns all rows in the order of the curriculum."""
        return self._ranked

    def is_plain(self, position: Position) -> bool:
        """Whether the curriculum is over at the start of an epoch."""
        return self.curriculum.is_complete(position)

    def pool(self, ranked: Indices, position: Position) -> Pool:
        """Returns the rows from which the steps from a position on draw."""
        return self.curriculum.pool(ranked, position)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The curriculum, and a checksum of the order of rows."""
        return {"settings": repr(self.curriculum), "checksum": zlib.crc32(self._ranked.tobytes())}


def rank_rows(scores: np.ndarray[Any, np.dtype[np.float64]], reverse: bool = False) -> Indices:
    """Returns the rows by increasing score. Rows with equal scores are shuffled, the same way in each run.

    Raises:
        ValueError: If a score is not a number.

    >>> rank_rows(np.array([0.5, 0.1, 0.9])).tolist()
    [1, 0, 2]
    """
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"the difficulty of training row {row} is {scores[row]}, not a finite number")
    shuffled = np.random.default_rng(0).permutation(len(scores))
    keys = -scores if reverse else scores
    return shuffled[np.argsort(keys[shuffled], kind="stable")].astype(np.int64)
