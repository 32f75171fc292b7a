"""Competence-based curriculum: the share of usable rows grows with the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from lightning_softprompt.data.curricula.base import DifficultyCurriculum
from lightning_softprompt.data.sampling.row_order import Indices, Pool, Position, window_size


@final
@dataclass(frozen=True)
class Competence(DifficultyCurriculum):
    """Draws uniformly from the easiest rows, whose share c(t) grows with the step (Platanios et al. 2019, 1903.09848).

    c(t) = min(1, (t (1 - c0^p) / T + c0^p)^(1/p)), with p = 2 for `sqrt` and p = 1 for `linear`. Steps are batches; all
    batches of a window, a twentieth of T, have the share of its first one. From the first epoch in which c = 1, each
    epoch uses each row once.

    Args:
        difficulty: Scores the rows.
        reverse: Whether to use difficult rows first, as a control.
        steps: T, the steps until all rows are used. The paper recommends 90 % of the steps that a training without
            curriculum needs to reach 90 % of its final score.
        initial: c0, the share of rows at the first step. At least the rows of a batch are used.
        growth: How the share grows.

    Raises:
        ValueError: If there are no steps, or the initial share is not above 0 and at most 1.
    """

    steps: int = 1000
    initial: float = 0.01
    growth: Literal["sqrt", "linear"] = "sqrt"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.initial <= 1:
            raise ValueError(
                f"steps must be at least 1, and initial above 0 and at most 1, got {self.steps} and {self.initial}"
            )

    def share(self, step: int) -> float:
        """Returns the share of rows c(t) that is used at a step."""
        power = {"sqrt": 2, "linear": 1}[self.growth]
        start = self.initial**power
        return float(min(1.0, (step * (1 - start) / self.steps + start) ** (1 / power)))

    def is_complete(self, position: Position) -> bool:
        """Whether all rows are used at a position."""
        return position.step >= self.steps

    def pool(self, ranked: Indices, position: Position) -> Pool:
        """Returns the share of rows at a position."""
        count = round(self.share(position.step) * len(ranked))
        return Pool(ranked[:count], window_size(self.steps))
