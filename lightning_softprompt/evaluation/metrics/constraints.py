"""Rates at which answers meet the constraints of their rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_softprompt.constraints.base import Constraint, constraint_classes
from lightning_softprompt.evaluation.metrics.intervals import bootstrap_ratio, share_interval

Results = list[tuple[str, bool, bool]]  # of one answer: label of each constraint, whether it is met strictly, loosely
MODES = ("strict", "loose")


def check_answer(answer: str, constraints: Sequence[Constraint]) -> Results:
    """Checks the constraints of an answer."""
    return [(item.label, item.passes(answer), item.passes(answer, is_loose=True)) for item in constraints]


def constraint_metric_names() -> list[str]:
    """Returns the names of metrics of all constraints that have no label of their own."""
    names = ["constraints", "prompts", *constraint_classes()]
    return [f"{name}_{mode}" for name in names for mode in MODES]


def summarize_constraints(rows: Sequence[Mapping[str, Any]], with_intervals: bool) -> dict[str, float]:
    """Returns the pass rates of rows: over constraints, over prompts (all constraints of a row), and by constraint.

    Args:
        rows: Rows with their `Results` as `constraints`.
        with_intervals: Whether to return 95 % intervals, too: bootstrap over rows for the rate over constraints, and
            Wilson's for the others.
    """
    results = [row["constraints"] for row in rows if row.get("constraints")]
    metrics: dict[str, float] = {}
    if not results:
        return metrics
    for index, mode in enumerate(MODES, 1):
        met = [[bool(item[index]) for item in row] for row in results]
        num_met, counts = [sum(row) for row in met], [len(row) for row in met]
        name = f"constraints_{mode}"
        metrics[name] = sum(num_met) / sum(counts)
        if with_intervals:
            metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap_ratio(num_met, counts)
        shares = {"prompts": [all(row) for row in met], **_by_label(results, index)}
        for label, values in shares.items():
            metrics |= _share(f"{label}_{mode}", values, with_intervals)
    return metrics


def _by_label(results: Sequence[Results], index: int) -> dict[str, list[bool]]:
    by_label: defaultdict[str, list[bool]] = defaultdict(list)
    for row in results:
        for item in row:
            by_label[item[0]].append(bool(item[index]))
    return dict(sorted(by_label.items()))


def _share(name: str, values: Sequence[bool], with_intervals: bool) -> dict[str, float]:
    share = sum(values) / len(values)
    if not with_intervals:
        return {name: share}
    low, high = share_interval(share, len(values))
    return {name: share, f"{name}_low": low, f"{name}_high": high}
