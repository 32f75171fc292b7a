"""Applies filters to rows, one after the other, and reports how many rows each dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_softprompt.synthetic.filters.base import Filter, Row


@dataclass(frozen=True)
class FilterCount:
    """What a filter did.

    Args:
        name: The filter.
        num_rows: Number of rows before it.
        num_dropped: Number of rows that it dropped.
    """

    name: str
    num_rows: int
    num_dropped: int


@dataclass(frozen=True)
class FilterResult:
    """The rows that pass all filters, and the others.

    Args:
        rows: The rows that pass, in order.
        dropped: The dropped rows with the filter and the reason, in the order of the filters.
        counts: What each filter did.
    """

    rows: Sequence[Row]
    dropped: Sequence[Row] = ()
    counts: Sequence[FilterCount] = field(default_factory=tuple)


def apply_filters(rows: Sequence[Row], filters: Sequence[Filter]) -> FilterResult:
    """Applies filters in order; each sees the rows that passed the filters before it.

    Raises:
        ValueError: If a row lacks a column that a filter requires, naming the filter.
    """
    remaining = list(rows)
    dropped: list[Row] = []
    counts = []
    for item in filters:
        name = type(item).__name__
        try:
            reasons = item.reasons(remaining)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        passed = []
        for row, reason in zip(remaining, reasons, strict=True):
            if reason is None:
                passed.append(row)
            else:
                values: dict[str, Any] = {"dropped_by": name, "reason": reason, **row}
                dropped.append(values)
        counts.append(FilterCount(name, len(remaining), len(remaining) - len(passed)))
        remaining = passed
    return FilterResult(remaining, dropped, counts)
