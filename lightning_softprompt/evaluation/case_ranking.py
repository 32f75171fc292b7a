"""Which rows of a test a page of cases shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Case = Mapping[str, Any]  # the record of a row


class CaseRanking(Protocol):
    """Selects the rows that are shown."""

    @property
    def title(self) -> str:
        """Title of the page."""

    def select(self, cases: Mapping[int, Case], count: int) -> dict[str, list[Case]]:
        """Returns the rows of each part of the page, at most `count` each; no row is in two parts."""


@dataclass(frozen=True)
class ByScore:
    """The rows with the highest and the lowest values of a score; rows without a finite score are left out.

    Args:
        score: Name of the score. A row with the score 0 is never one of the best.
    """

    score: str

    @property
    def title(self) -> str:
        """See `CaseRanking`."""
        return f"Best and worst cases by {self.score}"

    def select(self, cases: Mapping[int, Case], count: int) -> dict[str, list[Case]]:
        """Returns the best rows, best first, and the worst of the other rows, worst first."""
        scores = {row: (record["scores"] or {}).get(self.score, math.nan) for row, record in cases.items()}
        finite = [row for row, score in scores.items() if math.isfinite(score)]
        order = sorted(finite, key=lambda row: (-scores[row], row))
        best = [row for row in order[:count] if scores[row] > 0]
        worst = order[len(best) :][::-1][:count]
        return {"Best": [cases[row] for row in best], "Worst": [cases[row] for row in worst]}


@dataclass(frozen=True)
class ByConfidence:
    """The rows with a wrong class and a high probability, and those with the correct class and a low probability."""

    title: str = "Wrong and uncertain cases"

    def select(self, cases: Mapping[int, Case], count: int) -> dict[str, list[Case]]:
        """Returns the wrong rows, the most confident first, and the correct rows, the least confident first."""
        wrong = [row for row, record in cases.items() if record["prediction"] != record["target"]]
        correct = [row for row, record in cases.items() if record["prediction"] == record["target"]]
        wrong.sort(key=lambda row: (-_confidence(cases[row]), row))
        correct.sort(key=lambda row: (_confidence(cases[row]), row))
        return {
            "Wrong, the most confident first": [cases[row] for row in wrong[:count]],
            "Correct, the least confident first": [cases[row] for row in correct[:count]],
        }


def _confidence(record: Case) -> float:
    """The probability of the predicted class."""
    return float(record["scores"][record["prediction"]])
