"""The contract of orders that choose the training rows of each step, and how their rows become batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
WINDOW = 50  # batches; rows are sorted by length within a window, so that batches have similar rows and epochs differ


@dataclass(frozen=True)
class Position:
    """A position in a training.

    Args:
        batch: Number of the batch in its epoch.
        batches: Number of batches of an epoch.
        epoch: The epoch.
        rows_per_step: Rows of a batch on all processes.
    """

    batch: int
    batches: int
    epoch: int
    rows_per_step: int

    @property
    def step(self) -> int:
        """Number of the batch in the training."""
        return self.epoch * self.batches + self.batch


class Pool(NamedTuple):
    """The rows from which some steps draw.

    Args:
        rows: Indices of the rows.
        steps: Number of steps that draw from them.
    """

    rows: Indices
    steps: int


class RowOrder(ABC):
    """Chooses the rows of each step, as a function of the position and of scores that do not change in an epoch."""

    @abstractmethod
    def is_plain(self, position: Position) -> bool:
        """Whether an epoch that starts at a position uses each row once, in the plain shuffled order."""

    @abstractmethod
    def pool(self, ranked: Indices, position: Position) -> Pool:
        """Returns the rows from which the steps from a position on draw.

        Args:
            ranked: The usable rows, the easiest first.
            position: The position of the first of these steps.
        """

    @abstractmethod
    def ranked(self, epoch: int) -> Indices:
        """Returns all rows, the easiest first."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Values that must be equal to resume in this order."""

    @property
    def state(self) -> dict[str, Any]:
        """Values that a checkpoint stores because they cannot be computed again."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the values of `state`."""
        return


def window_size(steps: int) -> int:
    """Returns the batches of a window in an order whose pool changes over some steps: a twentieth of them.

    >>> window_size(5), window_size(60), window_size(10_000)
    (1, 3, 50)
    """
    return max(1, min(WINDOW, steps // 20))


def arrange_rows(
    order: RowOrder, lengths: Indices, num_rows: int, first: Position, draw: np.random.Generator
) -> tuple[Indices, Indices]:
    """Returns the rows of an epoch in the order in which they are divided into batches, and the order of the batches.

    A window of batches draws rows without replacement from its pool, so that no step has a row twice. Within a window,
    rows are sorted by length and batches are shuffled, so that an order by length does not give batches of one length
    in sequence. A pool that is smaller than a batch is filled with the rows that follow it in difficulty.

    Args:
        order: Chooses the pool of each window.
        lengths: Number of tokens of each row.
        num_rows: Number of rows of an epoch. If there are more, random ones are left out.
        first: The position of the first batch.
        draw: Random numbers of the epoch.
    """
    size = first.rows_per_step
    left_out = draw.permutation(len(lengths))[num_rows:]
    by_difficulty = order.ranked(first.epoch)
    ranked = by_difficulty[~np.isin(by_difficulty, left_out)]
    rows: list[Indices] = []
    turns: list[Indices] = []
    batch = 0
    while batch < first.batches:
        pool = order.pool(ranked, Position(batch, first.batches, first.epoch, size))
        candidates = fill_pool(pool.rows, ranked, min(size, num_rows - batch * size))
        steps = min(pool.steps, first.batches - batch, max(1, len(candidates) // size))
        needed = min((batch + steps) * size, num_rows) - batch * size
        chosen = draw.permutation(candidates)[:needed]
        full = needed - needed % size
        chosen[:full] = chosen[:full][np.argsort(lengths[chosen[:full]], kind="stable")]
        rows.append(chosen)
        turns.append(batch + draw.permutation(steps))
        batch += steps
    return np.concatenate(rows), np.concatenate(turns)


def fill_pool(pool: Indices, ranked: Indices, least: int) -> Indices:
    """Returns a pool of at least some rows: those that it lacks are the easiest of the others.

    >>> fill_pool(np.array([4]), np.array([3, 4, 0, 1]), 3).tolist()
    [4, 3, 0]
    """
    missing = max(0, least - len(pool))
    others = ranked[~np.isin(ranked, pool)] if missing else ranked[:0]
    return np.concatenate([pool, others[:missing]])
