"""How often each of several tasks comes up, and in which order their batches do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np

from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler, Indices
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler


class Sampling(ABC):
    """How many rows of each task are drawn, relative to each other."""

    @abstractmethod
    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """One for each task, from how many training rows it has."""


@final
@dataclass(frozen=True)
class Proportional(Sampling):
    """As many as the task has rows, n; with a limit, min(n, limit) (Raffel et al. 2020, arXiv 1910.10683, 3.5.2).

    Args:
        limit: Rows above which a task counts no more, so that a large one does not drown the rest.
    """

    limit: int | None = None

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """By task."""
        return [float(size) for size in limit_sizes(sizes, self.limit)]


@final
@dataclass(frozen=True)
class Temperature(Sampling):
    """min(n, limit)^(1 / temperature): 1 is proportional, and the hotter, the more alike (Raffel et al. 2020, 3.5.2).

    Args:
        temperature: T, above 0.
        limit: Rows above which a task counts no more.

    Raises:
        ValueError: If the temperature is not above 0.
    """

    temperature: float = 2.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """By task."""
        return [size ** (1 / self.temperature) for size in limit_sizes(sizes, self.limit)]


@final
@dataclass(frozen=True)
class UniformTasks(Sampling):
    """As many of each task."""

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """By task."""
        return [1.0] * len(sizes)


@final
@dataclass(frozen=True)
class FixedRates(Sampling):
    """Sampling rates from the configuration.

    Args:
        by_task: How many rows of each task, relative to each other.

    Raises:
        ValueError: If one is not above 0.
    """

    by_task: Mapping[str, float]

    def __post_init__(self) -> None:
        if any(rate <= 0 for rate in self.by_task.values()):
            raise ValueError(f"rates of tasks must be above 0, got {dict(self.by_task)}; leave a task out instead")

    def rates(self, sizes: Mapping[str, int]) -> list[float]:
        """By task.

        Raises:
            ValueError: If the tasks are others.
        """
        if set(self.by_task) != set(sizes):
            raise ValueError(f"by_task must name the tasks {list(sizes)}, got {list(self.by_task)}")
        return [self.by_task[name] for name in sizes]


def limit_sizes(sizes: Mapping[str, int], limit: int | None) -> list[int]:
    """The sizes, none above the limit.

    >>> limit_sizes({"a": 5, "b": 50}, 10)
    [5, 10]
    """
    return [size if limit is None else min(size, limit) for size in sizes.values()]


def quotas(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to a total, as near to the weights as can be, and none below one.

    Raises:
        ValueError: If there are more weights than things to share.

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
    """Batches of several tasks, each of one task's rows. Their order is a function of seed and epoch alone.

    Rows are numbered through all tasks. In an epoch each task has a fixed number of batches, in shuffled turns; each
    walks through its own rows in its own epochs, which do not end with the common ones: no row of a task comes again
    before all others of it have.

    Args:
        samplers: Those of the tasks, each over its own rows.
        counts: Batches of each task in an epoch; None gives each all it has, task after task.
        seed: Of the turns.
    """

    def __init__(
        self, samplers: Sequence[BucketBatchSampler], counts: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.samplers, self.shuffled = list(samplers), counts is not None
        self.counts = [len(sampler) for sampler in samplers] if counts is None else list(counts)
        self.offsets = list(accumulate((len(sampler.lengths) for sampler in samplers), initial=0))
        self._own: dict[int, tuple[int, list[list[int]]]] = {}  # by task, its epoch and the batches of that
        self.first = [0] * len(self.counts)  # batches of each task that come before all others

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def most_batches(self) -> int:
        """Batches of the rank that has most of them."""
        return sum(sampler.most_batches for sampler in self.samplers)

    def draw(self, batches: int) -> None:
        """Makes the first batches of a pass an even draw from each task.

        A task has as large a share of the batches as of all batches, and at least one; of more tasks than batches, the
        last ones have none.
        """
        counts = [sampler.most_batches for sampler in self.samplers]
        shared = min(batches, len(counts))
        first = quotas(min(batches, sum(counts[:shared])), counts[:shared])
        self.first = [*first, *[0] * (len(counts) - shared)]
        for sampler, share in zip(self.samplers, self.first, strict=True):
            sampler.draw(share)
        self.drawn = [rows for sampler in self.samplers for rows in sampler.drawn or ()]

    def _turns(self) -> Indices:
        """[batches] whose turn it is."""
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
        """The batch that a task has after so many others."""
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
