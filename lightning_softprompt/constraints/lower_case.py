"""Lower-case letters only."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint


@dataclass(frozen=True)
class LowerCase(Constraint):
    """The answer has letters, and none of them is a capital."""

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        return "Use lower-case letters only, without any capital letter."

    def is_met(self, answer: str) -> bool:
        """Returns whether all letters are in lower case."""
        return answer.islower()
