"""A batch sampler whose row indices also encode the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler


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
