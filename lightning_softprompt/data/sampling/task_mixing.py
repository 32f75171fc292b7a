"""The sampling rates of several tasks, and the order of their batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np

from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler
from lightning_softprompt.data.sampling.row_order import Indices


class Sampling(ABC):
    """The relative sampling rates of tasks."""

    @abstractmethod
    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """Returns the rate of each task, given its number of training rows."""


@final
@dataclass(frozen=True)
class Proportional(Sampling):
    """The number of rows n of a task; with a limit, min(n, limit) (Raffel et al. 2020, arXiv 1910.10683, 3.5.2).

    Args:
        limit: Maximum number of rows that counts, so that a large task does not dominate.
    """

    limit: int | None = None

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """Returns the rate of each task."""
        return [float(size) for size in limit_sizes(sizes, self.limit)]


@final
@dataclass(frozen=True)
class Temperature(Sampling):
    """min(n, limit)^(1 / T): proportional for T = 1, more uniform for higher temperatures (Raffel et al. 2020, 3.5.2).

    Args:
        temperature: T, above 0.
        limit: Maximum number of rows that counts.

    Raises:
        ValueError: If the temperature is not above 0.
    """

    temperature: float = 2.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """Returns the rate of each task."""
        return [size ** (1 / self.temperature) for size in limit_sizes(sizes, self.limit)]


@final
@dataclass(frozen=True)
class UniformTasks(Sampling):
    """The same rate for each task."""

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """Returns the rate of each task."""
        return [1.0] * len(sizes)


@final
@dataclass(frozen=True)
class FixedRates(Sampling):
    """Sampling rates from the configuration.

    Args:
        by_task: Relative rate of each task.

    Raises:
        ValueError: If a rate is not above 0.
    """

    by_task: Mapping[str, float]

    def __post_init__(self) -> None:
        if any(rate <= 0 for rate in self.by_task.values()):
            raise ValueError(f"rates of tasks must be above 0, got {dict(self.by_task)}; remove the task instead")

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """Returns the rate of each task.

        Raises:
            ValueError: If the tasks have other names.
        """
        if set(self.by_task) != set(sizes):
            raise ValueError(f"by_task must name the tasks {list(sizes)}, got {list(self.by_task)}")
        return [self.by_task[name] for name in sizes]


def limit_sizes(sizes: Mapping[str, int], limit: int | None) -> list[int]:
    """Returns the sizes, each at most the limit.

    >>> limit_sizes({"a": 5, "b": 50}, 10)
    [5, 10]
    """
    return [size if limit is None else min(size, limit) for size in sizes.values()]


def quotas(total: int, weights: Sequence[float]) -> list[int]:
    """Returns integers of at least 1 that add up to a total and are as proportional to the weights as possible.

    Raises:
        ValueError: If the total is below the number of weights.

    >>> quotas(10, [7, 2, 1]), quotas(4, [100, 1, 1]), quotas(5, [1, 1])
    ([7, 2, 1], [2, 1, 1], [3, 2])
    """
    if total < len(weights):
        raise ValueError(f"an epoch of {total} batches cannot have one of each of {len(weights)} tasks; make it longer")
    exact = np.asarray(weights, dtype=np.float64) * total / sum(weights)
    counts = np.maximum(1, np.floor(exact + 1e-9)).astype(int)
    while counts.sum() < total:
        counts[int(np.argmax(exact - counts))] += 1
    while counts.sum() > total:
        counts[int(np.argmax(np.where(counts > 1, counts - exact, -np.inf)))] -= 1
    return counts.tolist()  # type: ignore[no-any-return]


@final
class MixedBatchSampler(ResumableBatchSampler):
    """Batches of several tasks, each with rows of one task. Their order depends only on seed and epoch.

    Rows have one numbering for all tasks. Each task has a fixed number of batches per epoch, in random order. Each task
    has separate epochs over its rows, which are independent of the epochs of the training: no row of a task repeats
    before all its other rows were used.

    Args:
        samplers: The samplers of the tasks, each over the rows of its task.
        counts: Batches of each task per epoch (default: all batches, task by task).
        seed: Seed of the order of tasks.
    """

    def __init__(
        self, samplers: Sequence[BucketBatchSampler], counts: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.samplers, self.shuffled = list(samplers), counts is not None
        self.counts = [len(sampler) for sampler in samplers] if counts is None else list(counts)
        self.offsets = list(accumulate((len(sampler.lengths) for sampler in samplers), initial=0))
        self._own: dict[int, tuple[int, list[list[int]]]] = {}  # by task, its epoch and the batches of this epoch
        self.first = [0] * len(self.counts)  # number of batches of each task at the start of a pass

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def most_batches(self) -> int:
        """The number of batches of the rank with the most batches."""
        return sum(sampler.most_batches for sampler in self.samplers)

    def draw(self, batches: int) -> None:
        """Makes the first batches of a pass an even sample of each task.

        The share of a task is its share of all batches, and at least one batch. If there are more tasks than batches,
        the last tasks have none.
        """
        counts = [sampler.most_batches for sampler in self.samplers]
        shared = min(batches, len(counts))
        first = quotas(min(batches, sum(counts[:shared])), counts[:shared])
        self.first = [*first, *[0] * (len(counts) - shared)]
        for sampler, share in zip(self.samplers, self.first, strict=True):
            sampler.draw(share)
        self.drawn = [rows for sampler in self.samplers for rows in sampler.drawn or ()]

    def _turns(self) -> Indices:
        """The task of each batch [batches]."""
        tasks = np.arange(len(self.counts))
        if self.shuffled:
            turns = np.repeat(tasks, self.counts)
            return np.random.default_rng((self.seed, self.order_epoch)).permutation(turns)
        counts = np.array(self.counts, dtype=np.int64)
        first = np.minimum(np.array(self.first, dtype=np.int64), counts)
        return np.concatenate([np.repeat(tasks, first), np.repeat(tasks, counts - first)])

    def _batches(self, start: int) -> Iterator[list[int]]:
        places = [self.order_epoch * count for count in self.counts]
        for number, task in enumerate(self._turns().tolist()):
            place = places[task]
            places[task] += 1
            if number >= start:
                yield [self.offsets[task] + row for row in self._batch(task, place)]

    def _batch(self, task: int, place: int) -> list[int]:
        """The batch of a task at a position in the sequence of its batches."""
        sampler = self.samplers[task]
        epoch, number = divmod(place, len(sampler))
        if self._own.get(task, (None,))[0] != epoch:
            sampler.set_epoch(epoch)
            self._own[task] = epoch, list(sampler)
        return self._own[task][1][number]

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "batches of each task": list(self.counts),
            "seed": self.seed,
            "tasks": [sampler._identity for sampler in self.samplers],
        }
