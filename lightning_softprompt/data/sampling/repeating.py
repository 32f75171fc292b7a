"""A sampler that returns each batch several times, for objectives that take several steps for a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler


@final
class RepeatingSampler(ResumableBatchSampler):
    """Each batch of another sampler, several times in sequence.

    Args:
        inner: The other sampler.
        times: How often each batch is returned.
    """

    def __init__(self, inner: ResumableBatchSampler, times: int) -> None:
        super().__init__(inner.seed)
        self.inner, self.times = inner, times

    def __len__(self) -> int:
        return len(self.inner) * self.times

    def _batches(self, start: int) -> Iterator[list[int]]:
        self.inner.set_epoch(self.order_epoch)
        complete, turn = divmod(start, self.times)
        for rows in self.inner._batches(complete):
            for _ in range(turn, self.times):
                yield rows
            turn = 0

    @property
    def _identity(self) -> dict[str, Any]:
        return {**self.inner._identity, "steps per batch": self.times}

    @property
    def _order_state(self) -> dict[str, Any]:
        return self.inner._order_state

    def _restore_order_state(self, state: Mapping[str, Any]) -> None:
        self.inner._restore_order_state(state)
