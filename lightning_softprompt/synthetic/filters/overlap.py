"""Word sequences of test rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row, text_of, words_of


@dataclass(frozen=True)
class Overlap(Filter):
    """Drops texts that share a sequence of words with a test row: the model may have seen the test set.

    A text that is shorter than the sequence is dropped if it equals a test row.

    Args:
        path: Source of the test rows.
        words: Length of the sequence.
        column: Column of the text, in the rows and in the test rows.
        split: Split of the source, if it has several.
    """

    path: str
    words: int = 8
    column: str = "text"
    split: str = "test"

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words must be at least 1, got {self.words}")

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the shared sequence of each dropped row."""
        test_rows = read_rows(self.path, self.split)
        test_grams = {gram for row in test_rows for gram in self._ngrams(text_of(row, self.column))}
        reasons: Reasons = []
        for row in rows:
            shared = [gram for gram in self._ngrams(text_of(row, self.column)) if gram in test_grams]
            reasons.append(f"shares {' '.join(shared[0])!r} with a test row" if shared else None)
        return reasons

    def _ngrams(self, text: str) -> list[tuple[str, ...]]:
        words = words_of(text)
        starts = range(max(1, len(words) - self.words + 1))
        return [tuple(words[start : start + self.words]) for start in starts]
