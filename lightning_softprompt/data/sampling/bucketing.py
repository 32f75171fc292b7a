"""Groups rows of similar length into batches, in an order that a resumed run continues exactly."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from lightning_softprompt.data.sampling.repeating import RepeatingSampler
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler
from lightning_softprompt.data.sampling.row_order import WINDOW, Indices, Position, RowOrder, arrange_rows

Order = Literal["shuffled", "longest_first", "given"]


class Table(Protocol):
    """Numbered rows."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """Row `index`."""


@final
class BucketBatchSampler(ResumableBatchSampler):
    """Batches of rows of similar length. Their order depends only on seed and epoch.

    Orders: `shuffled` for training, bucketed by length; `longest_first` for evaluation, so that an out-of-memory error
    occurs in the first batch; `given` for prediction. `draw` is for an evaluation that runs only some batches.

    On several ranks, a shuffled order is divided into batches for all ranks together, and each rank takes its share of
    every batch. All ranks therefore take the same number of steps, on rows of similar length, and another number of
    ranks with the same `batch_size * world_size` sees the same batches. Rows of the last batch that cannot be shared
    evenly are dropped, different ones in each epoch. Evaluation neither drops nor repeats rows: the numbers of rows of
    the ranks differ by at most one, and with fewer rows than ranks, some ranks have none.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Rows per batch of one rank.
        order: How rows are ordered.
        seed: Seed of the shuffled order.
        rank: Number of this process.
        world_size: Number of processes that share the rows.
        drop_last: Drop the last batch of a shuffled order if it is not full.
        weights: Sampling weight of each row, with replacement; the number of rows per epoch does not change.
        max_tokens: Maximum tokens per batch, instead of batch_size. All batches have about as many tokens, and so take
            about the same time.

    Raises:
        ValueError: If the arguments contradict each other, or leave a rank without a batch.

    >>> list(BucketBatchSampler([3, 9, 5, 1], batch_size=3, order="longest_first"))
    [[1, 2, 0], [3]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int = 1,
        *,
        order: Order,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        weights: Sequence[float] | None = None,
        max_tokens: int | None = None,
        row_order: RowOrder | None = None,
    ) -> None:
        if row_order is not None and (weights is not None or max_tokens is not None):
            raise ValueError("a row order excludes weights of rows and max_tokens; set batch_size, or no curriculum")
        if order != "shuffled" and (drop_last or weights is not None):
            raise ValueError(f"drop_last and weights require the order 'shuffled', got {order!r}; remove them")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size must be at least 1 and 0 <= rank < world_size, got {batch_size}, {rank}, {world_size}"
            )
        super().__init__(seed)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.odds = None if weights is None else _odds(weights, len(self.lengths))
        self.order, self.rank, self.world_size = order, rank, world_size
        self.row_order = row_order
        self.max_tokens, self.pieces = max_tokens, 0
        self.first: int | None = None  # number of batches whose rows are an even sample; None for all batches
        if max_tokens is not None:
            if drop_last or weights is not None:
                raise ValueError("max_tokens excludes drop_last and weights; set batch_size instead")
            self.pieces = self._count_pieces(max_tokens)
            batch_size = max(1, len(self.lengths) // self.pieces)  # on average
        # Lightning rebuilds each sampler with attributes batch_size and drop_last as a BatchSampler of torch.
        self.rows_per_rank, self.rows_per_step = batch_size, batch_size * world_size
        self.kept = len(self.lengths) - (len(self.lengths) % self._unit(drop_last))
        if self.kept < (world_size if order == "shuffled" else 1):
            raise ValueError(
                f"{len(self.lengths)} rows give no batch to each of {world_size} processes, with "
                f"batch_size={batch_size} and drop_last={drop_last}; use fewer processes, a smaller batch, or more rows"
            )

    def _count_pieces(self, most: int) -> int:
        """The number of batches of similar size per epoch, so that none has more than `most` tokens.

        It is the same for all epochs. A batch ends with the row that completes its share, so it exceeds the share by
        less than the longest row. No batch is empty if the longest row has at most a third of `most` tokens.
        """
        longest, total = int(self.lengths.max(initial=1)), int(self.lengths.sum())
        if most < 3 * longest:
            raise ValueError(f"max_tokens={most} requires rows of at most a third of it, but one has {longest}")
        pieces = math.ceil(total / (most - longest + 1))
        pieces += -pieces % self.world_size
        if total < longest * pieces:
            raise ValueError(f"too few rows for batches of {most} tokens on {self.world_size} processes; use fewer")
        return pieces

    def _split_into_batches(self, rows: Indices) -> list[Indices]:
        """Divide rows into batches with similar numbers of tokens."""
        ends = np.cumsum(self.lengths[rows])
        piece = (ends * self.pieces - 1) // ends[-1]  # [rows]
        return np.split(rows, np.searchsorted(piece, np.arange(1, self.pieces)))

    def _unit(self, drop_last: bool) -> int:
        """The number of rows used is a multiple of this."""
        if self.order != "shuffled" or self.pieces:
            return 1
        return self.rows_per_step if drop_last else self.world_size

    @property
    def most_batches(self) -> int:
        """The number of batches of the rank with the most batches."""
        return self.pieces // self.world_size if self.pieces else math.ceil(self.kept / self.rows_per_step)

    def draw(self, batches: int) -> None:
        """Makes the first batches of each rank an even sample of all rows, the same in each pass.

        Args:
            batches: Number of batches that run.
        """
        self.first = batches
        rows, most = self._sort_rows()[0], batches * self.rows_per_step
        if self.pieces:
            most = sum(map(len, self._split_into_batches(rows)[: batches * self.world_size]))
        self.drawn = [sorted(rows[:most].tolist())]

    def __len__(self) -> int:
        if self.pieces:
            return self.pieces // self.world_size
        return math.ceil(len(range(self.rank, self.kept, self.world_size)) / self.rows_per_rank)

    def _batches(self, start: int) -> Iterator[list[int]]:
        rows, turns = self._shuffle_rows() if self.order == "shuffled" else self._sort_rows()
        if self.pieces:
            pieces = self._split_into_batches(rows)[self.rank :: self.world_size]
            yield from (pieces[turn].tolist() for turn in turns[start:])
            return
        share, size = rows[self.rank : self.kept : self.world_size], self.rows_per_rank
        for turn in turns[start:].tolist():
            yield share[turn * size : (turn + 1) * size].tolist()

    def _sort_rows(self) -> tuple[Indices, Indices]:
        turns = np.arange(len(self))
        if self.first is not None:
            return self._evenly(self.first * self.world_size), turns
        keys = -self.lengths if self.order == "longest_first" else np.zeros_like(self.lengths)
        return np.argsort(keys, kind="stable"), turns

    def _evenly(self, batches: int) -> Indices:
        """All rows: first an even sample that fills the given number of batches, the longest first, then the others.

        The sample has rows at equal distances in the order of their lengths. Rows of the same length are shuffled, so
        that the distance cannot coincide with a pattern of the file.
        """
        count = len(self.lengths)
        most = count * batches // self.pieces if self.pieces else batches * self.rows_per_rank
        mixed = np.random.default_rng(self.seed).permutation(count)
        by_length = mixed[np.argsort(-self.lengths[mixed], kind="stable")]
        num_drawn = min(most, count)
        # the middles of num_drawn intervals of equal size
        positions = (2 * np.arange(num_drawn) + 1) * count // (2 * max(1, num_drawn))
        drawn = by_length[positions]
        return np.concatenate([drawn, mixed[~np.isin(mixed, drawn)]])

    def _shuffle_rows(self) -> tuple[Indices, Indices]:
        """Rows in the order in which they are divided into batches, and the order of the batches.

        The incomplete batch consists of the last rows and is not bucketed: which rows are dropped must not depend on
        their lengths, and the other batches must not depend on the number of dropped rows.
        """
        count, step = len(self.lengths), self.rows_per_step
        draw = np.random.default_rng((self.seed, self.order_epoch))
        if self.row_order is not None:
            first = Position(0, math.ceil(self.kept / step), self.order_epoch, step)
            if not self.row_order.is_plain(first):
                rows, turns = arrange_rows(self.row_order, self.lengths, self.kept, first, draw)
                return rows, turns[turns < len(self)]
        rows = draw.permutation(count) if self.odds is None else draw.choice(count, count, p=self.odds)
        full = count if self.pieces else count - count % step
        for begin in range(0, full, WINDOW * step):
            window = rows[begin : min(begin + WINDOW * step, full)]
            window[:] = window[np.argsort(self.lengths[window], kind="stable")]
        turns = draw.permutation(len(self) if self.pieces else math.ceil(count / step))
        return rows, turns[turns < len(self)]

    @property
    def _identity(self) -> dict[str, Any]:
        """Values that must be equal to resume in this order."""
        weights = b"" if self.odds is None else self.odds.tobytes()
        checksum = zlib.crc32(weights, zlib.crc32(self.lengths.tobytes()))
        of_order = {} if self.row_order is None else {"curriculum": dict(self.row_order.identity)}
        return {
            "rows": len(self.lengths),
            "batch_size * world_size": self.rows_per_step,
            "batches per epoch": len(self),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "order": self.order,
            "checksum of lengths and weights": checksum,
            **of_order,
        }

    @property
    def _order_state(self) -> dict[str, Any]:
        return {} if self.row_order is None else self.row_order.state

    def _restore_order_state(self, state: Mapping[str, Any]) -> None:
        if self.row_order is not None:
            self.row_order.restore(state)


def _odds(weights: Sequence[float], rows: int) -> npt.NDArray[np.float64]:
    odds: npt.NDArray[np.float64] = np.array(weights, dtype=np.float64)
    if odds.shape != (rows,) or not np.isfinite(odds).all() or odds.min(initial=0) < 0 or not odds.any():
        raise ValueError(
            f"weights must be {rows} finite numbers, one for each row, none below and some above zero; got "
            f"{odds.size} from {odds.min(initial=0)} to {odds.max(initial=0)}"
        )
    odds /= odds.sum()
    return odds


def leave_group(number: int) -> None:
    """Takes a data worker out of the process group of its run, so that it receives neither Ctrl-C nor a SIGTERM.

    A worker that ended early would stop the run before its checkpoint is written. Workers end with their run.
    """
    os.setpgid(0, 0)


class ResumableLoader:
    """Loads the batches of a resumable sampler and counts those that the loop has received.

    Lightning saves and restores it with the fit loop, like every object with `state_dict` and `load_state_dict`. It
    contains a `DataLoader` but is not one, because Lightning replaces the sampler of a `DataLoader` for prediction and
    on several ranks.

    A resumed run repeats the randomness of a data set if it depends only on seed, epoch and row, or if `num_workers`
    is 0 and the state of the random numbers is restored.

    Args:
        dataset: The rows.
        batch_sampler: Selects the rows of each batch.
        collate_fn: Creates a batch from a list of rows.
        num_workers: Number of processes that load batches in advance; 0 loads in this process.
    """

    def __init__(
        self, dataset: Table, batch_sampler: ResumableBatchSampler, collate_fn: Callable[..., Any], num_workers: int = 0
    ) -> None:
        self.dataset, self.batch_sampler = dataset, batch_sampler
        self._loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]  # torch annotates its own class, but uses only these methods
            batch_sampler=batch_sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Each pass draws a number: from the global generator, a validation would change the dropout after it.
            generator=torch.Generator().manual_seed(batch_sampler.seed),
            worker_init_fn=leave_group,
        )

    def repeated(self, times: int) -> ResumableLoader:
        """Returns a loader that returns each batch several times in sequence."""
        if times == 1:
            return self
        sampler = RepeatingSampler(self.batch_sampler, times)
        return ResumableLoader(self.dataset, sampler, self._loader.collate_fn, self._loader.num_workers)

    def __len__(self) -> int:
        # Lightning skips the pass of a process without rows, but the other processes wait for it at the end.
        return max(1, len(self.batch_sampler))

    def __iter__(self) -> Iterator[Any]:
        # Nothing is computed before the first batch is requested: a resuming Lightning creates the iterator before it
        # sets the epoch, which is the next one if the saved epoch was complete or ended early.
        for batch in self._loader:
            self.batch_sampler.count()
            yield batch

    def skip_to(self, row: int) -> int:
        """Begin with the batch that contains a row, without loading earlier batches. Returns their number."""
        return self.batch_sampler.skip_to(row)

    def state_dict(self) -> dict[str, Any]:
        """The position in the order of batches."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch that was returned, without loading earlier batches."""
        self.batch_sampler.load_state_dict(state)

    @property
    def _iterator(self) -> Any:  # Lightning ends the workers of what has an `_iterator`, then sets it to None
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value
