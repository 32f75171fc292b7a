"""Equal numbers of rows of each class."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row


@dataclass(frozen=True)
class Balance(Filter):
    """Drops random rows so that all classes have as many rows as the smallest one. Use it after all other filters.

    Args:
        label: Column of the class.
        most: Maximum number of rows of a class; null for no maximum.
        seed: Seed of the choice.
    """

    label: str = "label"
    most: int | None = None
    seed: int = 0

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the reason for surplus rows."""
        groups: dict[object, list[int]] = {}
        for index, row in enumerate(rows):
            if self.label not in row:
                raise ValueError(f"a row has no class in the column {self.label!r}; its columns are {sorted(row)}")
            groups.setdefault(row[self.label], []).append(index)
        smallest = min((len(indices) for indices in groups.values()), default=0)
        count = smallest if self.most is None else min(smallest, self.most)
        generator = random.Random(self.seed)
        reasons: Reasons = [None] * len(rows)
        for name, indices in groups.items():
            for index in sorted(generator.sample(indices, len(indices))[count:]):
                reasons[index] = f"class {name} has {len(indices)} rows, {count} are used"
        return reasons
