"""Bounds on a score of the writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row


@dataclass(frozen=True)
class Score(Filter):
    """Drops rows by a score of their writer, such as `round_trip_f1`, `keywords` or `similarity`.

    Args:
        name: The score, a key of the column `scores`.
        low: Smallest score that passes.
        high: Largest score that passes.
    """

    name: str
    low: float = float("-inf")
    high: float = float("inf")

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the scores outside the bounds."""
        reasons: Reasons = []
        for row in rows:
            scores = row.get("scores") or {}
            if self.name not in scores:
                raise ValueError(f"a row has no score {self.name!r}; its scores are {sorted(scores)}")
            score = float(scores[self.name])
            reasons.append(None if self.low <= score <= self.high else f"{self.name} {score:.2f}")
        return reasons
