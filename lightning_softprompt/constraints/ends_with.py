"""A required end."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint

CLOSING = " \t\n\"'”’"  # noqa: RUF001


@dataclass(frozen=True)
class EndsWith(Constraint):
    """The answer ends with a phrase. Case and closing quotation marks are ignored.

    Args:
        phrase: The phrase.
    """

    phrase: str

    def __post_init__(self) -> None:
        if not isinstance(self.phrase, str) or not self.phrase.strip():
            raise ValueError(f"ends_with requires a phrase, got {self.phrase!r}")

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        return f"End the answer with the exact phrase '{self.phrase}' and write nothing after it."

    def is_met(self, answer: str) -> bool:
        """Returns whether the answer ends with the phrase."""
        end = self.phrase.strip(CLOSING).casefold()
        return answer.rstrip(CLOSING).casefold().endswith(end)
