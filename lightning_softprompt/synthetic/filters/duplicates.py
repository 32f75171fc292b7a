"""Equal texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row, text_of, words_of


@dataclass(frozen=True)
class Duplicates(Filter):
    """Drops texts whose words equal those of an earlier row.

    Args:
        column: Column of the text.
    """

    column: str = "text"

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the index of the equal row for each duplicate."""
        first: dict[tuple[str, ...], int] = {}
        reasons: Reasons = []
        for index, row in enumerate(rows):
            earlier = first.setdefault(tuple(words_of(text_of(row, self.column))), index)
            reasons.append(None if earlier == index else f"equals row {rows[earlier].get('row', earlier)}")
        return reasons
