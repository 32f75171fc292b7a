"""A number of sentences."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint, check_range, describe_range
from lightning_softprompt.core.sentences import sentences


@dataclass(frozen=True)
class SentenceCount(Constraint):
    """The answer has a number of sentences within bounds, as `core.sentences` splits them.

    Args:
        low: Minimum number of sentences.
        high: Maximum number of sentences.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        check_range("sentence_count", self.low, self.high)

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        unit = "sentence" if self.high == 1 else "sentences"
        return f"Answer in {describe_range(self.low, self.high)} {unit}."

    def is_met(self, answer: str) -> bool:
        """Returns whether the number of sentences is within the bounds."""
        return self.low <= len(sentences(answer)) <= self.high
