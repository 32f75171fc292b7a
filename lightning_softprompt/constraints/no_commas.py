"""No commas."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint

COMMAS = ",，、،"  # noqa: RUF001  Latin, full-width, ideographic and Arabic commas


@dataclass(frozen=True)
class NoCommas(Constraint):
    """The answer has no comma of any script."""

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        return "Do not use any commas."

    def is_met(self, answer: str) -> bool:
        """Returns whether the answer has no commas."""
        return not any(comma in answer for comma in COMMAS)
