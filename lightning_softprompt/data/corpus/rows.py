"""The windows of a split: of one corpus or several, in memory or on disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar, overload

from lightning_softprompt.data.prepared import PreparedRows

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Chain(Sequence[T]):
    """Several sequences as one, without a copy."""

    parts: Sequence[Sequence[T]]
    starts: Sequence[int]

    @classmethod
    def of(cls, parts: Sequence[Sequence[T]]) -> Chain[T]:
        """The sequences, one after the other."""
        return cls(parts, list(accumulate(map(len, parts), initial=0)))

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """The item at an index, or a list of items."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        position = index % len(self)
        part = bisect_right(self.starts, position) - 1
        return self.parts[part][position - self.starts[part]]


@dataclass(frozen=True)
class CorpusRows(PreparedRows):
    """The windows of all corpora of a split, one corpus after the other.

    Args:
        parts: The windows of each corpus by its name; the name of the main corpus is empty.
    """

    parts: Mapping[str, PreparedRows]

    @classmethod
    def of(cls, parts: Mapping[str, PreparedRows]) -> CorpusRows:
        """The windows of several corpora."""
        rows = list(parts.values())
        return cls(
            Chain.of([part.examples for part in rows]),
            Chain.of([part.encoded for part in rows]),
            Chain.of([part.origins for part in rows]),
            parts,
        )

    @property
    def sample(self) -> PreparedRows:
        """The sample of the main corpus."""
        return self.parts[""].sample

    @property
    def lengths(self) -> Sequence[int]:
        """Size of each window."""
        lengths = [part.lengths for part in self.parts.values()]
        return lengths[0] if len(lengths) == 1 else Chain.of(lengths)
