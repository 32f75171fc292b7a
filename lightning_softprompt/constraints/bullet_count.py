"""A number of bullet points."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint, check_range

BULLET = re.compile(r"^\s*[*•-]\s+\S", re.MULTILINE)


@dataclass(frozen=True)
class BulletCount(Constraint):
    """The answer has an exact number of lines that begin with `*`, `-` or `•` and a space.

    Args:
        count: The number of bullet points.
    """

    count: int

    def __post_init__(self) -> None:
        check_range("bullet_count", self.count, self.count)

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        return f"Answer with a list of exactly {self.count} bullet points, each on a line that begins with '* '."

    def is_met(self, answer: str) -> bool:
        """Returns whether the number of bullet points is the requested one."""
        return len(BULLET.findall(answer)) == self.count
