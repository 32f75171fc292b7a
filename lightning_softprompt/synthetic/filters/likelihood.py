"""A band of log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row


@dataclass(frozen=True)
class Likelihood(Filter):
    """Drops the rows whose mean log-probability is lowest or highest, separately for each class.

    SuperGen (Meng et al. 2022, arXiv 2202.04538) selects rows of high probability. The most probable texts are often
    repetitive, so an upper bound is useful, too.

    Args:
        low: Share of rows with the lowest log-probability to drop.
        high: Share of rows with the highest log-probability to drop.
        label: Column of the class; null to compare all rows.
    """

    low: float = 0.25
    high: float = 0.05
    label: str | None = "label"

    def __post_init__(self) -> None:
        if self.low < 0 or self.high < 0 or self.low + self.high >= 1:
            raise ValueError(f"Likelihood requires shares that add up to less than 1, got {self.low} and {self.high}")

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the log-probability of rows outside the band."""
        groups: dict[object, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(None if self.label is None else row.get(self.label), []).append(index)
        reasons: Reasons = [None] * len(rows)
        for indices in groups.values():
            values = {index: rows[index].get("logprob") for index in indices}
            known = [value for value in values.values() if value is not None]
            low, high = np.quantile(known, [self.low, 1 - self.high]) if known else (0.0, 0.0)
            for index, value in values.items():
                if value is None:
                    reasons[index] = "no log-probability"
                elif not low <= value <= high:
                    reasons[index] = f"log-probability {value:.2f} outside [{low:.2f}, {high:.2f}]"
        return reasons
