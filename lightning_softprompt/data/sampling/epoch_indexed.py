"""Rows that are drawn again in each epoch, as a function of seed, epoch and row, and the sampler of their indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler

Rng = np.random.Generator
Item = tuple[int, Encoded, Example]


@dataclass(frozen=True)
class EpochIndexedRows(ABC):
    """Rows indexed by `epoch * len(rows) + row`, each a function of seed, epoch and row. Picklable, for data workers.

    Args:
        rows: The rows that do not change.
        seed: Seed of the changes.
    """

    rows: PreparedRows
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    @final
    def __getitem__(self, number: int) -> Item:
        epoch, row = divmod(number, len(self))
        return self.draw(row, np.random.default_rng((self.seed, epoch, row)))

    @abstractmethod
    def draw(self, row: int, rng: Rng) -> Item:
        """Returns a row in an epoch.

        Args:
            row: Index of the row.
            rng: Random numbers of the row in this epoch.
        """


@final
class EpochIndexedSampler(ResumableBatchSampler):
    """Batches of another sampler whose row indices also encode the epoch, so that data workers know the epoch.

    Args:
        inner: The other sampler.
        rows: Number of rows. Row r of epoch e has the index `e * rows + r`.
    """

    def __init__(self, inner: ResumableBatchSampler, rows: int) -> None:
        super().__init__(inner.seed)
        self.inner, self.rows = inner, rows

    def __len__(self) -> int:
        return len(self.inner)

    def _batches(self, start: int) -> Iterator[list[int]]:
        self.inner.set_epoch(self.order_epoch)
        first = self.order_epoch * self.rows
        for rows in self.inner._batches(start):
            yield [first + row for row in rows]

    @property
    def _identity(self) -> dict[str, Any]:
        return self.inner._identity

    @property
    def _order_state(self) -> dict[str, Any]:
        return self.inner._order_state

    def _restore_order_state(self, state: Mapping[str, Any]) -> None:
        self.inner._restore_order_state(state)
