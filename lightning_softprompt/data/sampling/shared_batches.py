"""Batches with rows of several tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np

from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler
from lightning_softprompt.data.sampling.row_order import Indices


@final
@dataclass(frozen=True)
class SharedBatches:
    """Batches with rows of several tasks, in numbers as equal as possible (Wang et al. 2023, MPT, arXiv 2303.02861).

    The tasks of a batch are sampled without replacement by the rates of `sampling`.

    Args:
        rows: Rows per batch, on each device. The `batch_size` of the tasks then applies to evaluation only.
        tasks: Tasks per batch (default: a random number for each batch, from 2 to all tasks).

    Raises:
        ValueError: If there are no rows, or no tasks.
    """

    rows: int = 16
    tasks: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or (self.tasks is not None and self.tasks < 1):
            raise ValueError(f"together.rows and tasks must be at least 1, got {self.rows} and {self.tasks}")

    def most(self, tasks: int) -> int:
        """Returns the maximum number of tasks per batch.

        Raises:
            ValueError: If there are fewer tasks than a batch requires.
        """
        if self.tasks is not None and self.tasks > tasks:
            raise ValueError(f"together.tasks is {self.tasks}, but there are only {tasks} tasks")
        return self.tasks or tasks


@final
class SharedBatchSampler(ResumableBatchSampler):
    """Batches with rows of several tasks. Their order depends only on seed and epoch.

    Rows have one numbering for all tasks. Each task has separate epochs over its rows, which are independent of the
    epochs of the training: no row of a task repeats before all its other rows were used. On several ranks, a batch is
    drawn for all of them, and each rank takes its share of every task's rows, so that another number of ranks sees the
    same batches.

    Args:
        samplers: The samplers of the tasks, each over the rows of its task, as if on one rank.
        together: Rows and tasks per batch.
        rates: Relative sampling rate of each task.
        count: Batches per epoch (default: as many as all rows fill).
        seed: Seed of the sampling.
        ranks: Number of this process, and the number of processes.

    Raises:
        ValueError: If a batch cannot have a row of each of its tasks on each rank.
    """

    def __init__(
        self,
        samplers: Sequence[BucketBatchSampler],
        together: SharedBatches,
        rates: Sequence[float],
        count: int | None = None,
        seed: int = 0,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(seed)
        self.samplers, self.together, self.rates = list(samplers), together, list(rates)
        self.rank, self.world_size = ranks
        self.rows = together.rows * self.world_size
        self.sizes = [len(sampler.lengths) for sampler in samplers]
        self.offsets = list(accumulate(self.sizes, initial=0))
        self.most = together.most(len(samplers))
        if self.most > together.rows:
            raise ValueError(
                f"a batch of {together.rows} rows cannot have one of each of {self.most} tasks; raise together.rows"
            )
        self.count_of_batches = count or -(-sum(self.sizes) // self.rows)
        self._starts = [np.zeros(len(samplers), dtype=np.int64)]  # rows of each task in all epochs before each epoch
        self._own: dict[int, tuple[int, list[int]]] = {}  # by task, its epoch and the order of its rows in this epoch

    def __len__(self) -> int:
        return self.count_of_batches

    def shares(self, epoch: int) -> Indices:
        """Numbers of rows [batches, K] of each task in the batches of an epoch."""
        draw = np.random.default_rng((self.seed, epoch))
        batches, tasks = len(self), len(self.samplers)
        many = np.full(batches, self.most)
        if self.together.tasks is None:
            many = draw.integers(min(2, tasks), tasks + 1, batches)
        # The order of exponential variables divided by the rates equals sampling by the rates without replacement.
        turn = (draw.exponential(size=(batches, tasks)) / np.array(self.rates)).argsort(1).argsort(1)  # [batches, K]
        even, left = self.rows // many[:, None], self.rows % many[:, None]
        return np.where(turn < many[:, None], even + (turn < left), 0)

    def _before(self, epoch: int) -> Indices:
        """Numbers of rows [K] of each task in all epochs before an epoch."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + self.shares(len(self._starts) - 1).sum(0))
        return self._starts[epoch]

    def _batches(self, start: int) -> Iterator[list[int]]:
        shares = self.shares(self.order_epoch)
        begins = self._before(self.order_epoch) + shares.cumsum(0) - shares  # [batches, K]
        for begin, share in zip(begins[start:].tolist(), shares[start:].tolist(), strict=True):
            rows = [self._row(task, begin[task] + n) for task, many in enumerate(share) for n in range(many)]
            yield rows[self.rank :: self.world_size]

    def _row(self, task: int, place: int) -> int:
        """The row of a task at a position in the sequence of its rows."""
        epoch, number = divmod(place, self.sizes[task])
        if self._own.get(task, (None,))[0] != epoch:
            self.samplers[task].set_epoch(epoch)
            self._own[task] = epoch, [row for batch in self.samplers[task] for row in batch]
        return self.offsets[task] + self._own[task][1][number]

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "rows of a batch * world_size": self.rows,
            "tasks of a batch": self.together.tasks,
            "rates": self.rates,
            "batches per epoch": len(self),
            "seed": self.seed,
            "tasks": [sampler._identity for sampler in self.samplers],
        }
