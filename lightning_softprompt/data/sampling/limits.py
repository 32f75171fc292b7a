"""The Trainer's limits on batches: how many batches run, and which rows a limited evaluation scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class LimitableSampler(Protocol):
    """A batch sampler whose first batches can be an even sample of all rows."""

    drawn: list[list[int]] | None

    @property
    def most_batches(self) -> int:
        """Number of batches of the process with the most batches."""

    def draw(self, batches: int) -> None:
        """Makes the first `batches` batches an even sample of all rows."""


def count_batches(limit: float, count: int) -> int:
    """Returns the number of batches that run under a limit of the Trainer, which is a number or a fraction of batches.

    >>> count_batches(3, 10), count_batches(0.5, 10), count_batches(20, 10)
    (3, 5, 10)
    """
    return min(limit, count) if isinstance(limit, int) else int(limit * count)


def describe_limit(name: str, option: str, limit: float, sample: Sequence[Sequence[int]], count: int) -> str:
    """Describes which rows a limited evaluation scores, for the log.

    Args:
        name: The split.
        option: The Trainer's option that sets the limit.
        limit: Its value.
        sample: The sampled rows of each task.
        count: Number of rows of the split.
    """
    rows = sum(map(len, sample))
    empty = [str(task) for task, task_rows in enumerate(sample) if not task_rows]
    without = f"; tasks without rows in the sample: {', '.join(empty)}" if empty else ""
    return f"{option}={limit}: {name} scores {rows} of {count} rows, an even sample, the same in each epoch{without}"
