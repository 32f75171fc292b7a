"""A number of words."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint, check_range, describe_range
from lightning_softprompt.core.word_boundaries import split_words


@dataclass(frozen=True)
class WordCount(Constraint):
    """The answer has a number of words within bounds, as `split_words` counts them.

    Args:
        low: Minimum number of words.
        high: Maximum number of words.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        check_range("word_count", self.low, self.high)

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        return f"Answer with {describe_range(self.low, self.high)} words."

    def is_met(self, answer: str) -> bool:
        """Returns whether the number of words is within the bounds."""
        count = len(split_words(unicodedata.normalize("NFC", answer)))
        return self.low <= count <= self.high
