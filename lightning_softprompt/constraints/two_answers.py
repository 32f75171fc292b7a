"""Two different answers."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint

SEPARATOR = "******"


@dataclass(frozen=True)
class TwoAnswers(Constraint):
    """The answer consists of two different answers with `******` between them."""

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        return f"Give two different answers, with a line of six asterisks ({SEPARATOR}) between them."

    def passes(self, answer: str, is_loose: bool = False) -> bool:
        """Returns whether there are two answers. Variants without markup would lack the separator."""
        return self.is_met(answer)

    def is_met(self, answer: str) -> bool:
        """Returns whether there are two different answers."""
        parts = [part.strip() for part in answer.split(SEPARATOR)]
        return len(parts) == 2 and all(parts) and parts[0] != parts[1]
