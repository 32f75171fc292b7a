"""Texts that the model did not end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row, text_of

ENDS = ".!?…。！？\"'”’)]"  # noqa: RUF001


@dataclass(frozen=True)
class Unfinished(Filter):
    """Drops texts that reached the limit of tokens, and optionally those without a closing mark.

    Args:
        punctuation: Whether texts must end with a closing mark, such as a full stop.
        column: Column of the text.
    """

    punctuation: bool = False
    column: str = "text"

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns why texts are not finished. Rows that do not report whether they are finished count as finished."""
        reasons: Reasons = []
        for row in rows:
            text = text_of(row, self.column).rstrip()
            reason = None
            if not row.get("is_finished", True):
                reason = "reached the limit of tokens"
            elif self.punctuation and not text.endswith(tuple(ENDS)):
                reason = "no closing mark"
            reasons.append(reason)
        return reasons
