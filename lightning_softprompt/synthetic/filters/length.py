"""Bounds on the number of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row, text_of, words_of


@dataclass(frozen=True)
class Length(Filter):
    """Drops texts with too few or too many words.

    Args:
        low: Minimum number of words.
        high: Maximum number of words; null for no maximum.
        column: Column of the text.
    """

    low: int = 1
    high: int | None = None
    column: str = "text"

    def __post_init__(self) -> None:
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise ValueError(f"Length requires 0 <= low <= high, got low={self.low} and high={self.high}")

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the number of words of texts outside the bounds."""
        reasons: Reasons = []
        for row in rows:
            count = len(words_of(text_of(row, self.column)))
            is_long = self.high is not None and count > self.high
            reasons.append(f"{count} words" if count < self.low or is_long else None)
        return reasons
