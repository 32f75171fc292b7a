"""What the answers of a test come to: by kind of mistake, by group of rows, and beside another run's, row by row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.retrieval import KS, RetrievalScores
from lightning_softprompt.reports.error_types import KINDS, NOT_KNOWN, RANKS, AnsweredRow

Rows = Sequence[AnsweredRow]
MEASURES = ("exact_match", "f1")
DRAWS = 2000  # for intervals of groups, of which there are many
ORDER = {name: place for place, name in enumerate([*(name for _, name in RANKS), "11+"])}


def analysis(rows: Rows) -> dict[str, Any]:
    """All there is to say of a run's rows, as JSON can say it.

    Args:
        rows: At least one.
    """
    return {
        **summary(rows),
        "mistakes": {kind: told for kind in KINDS if (told := _of_kind(rows, kind))["rows"]},
        "groups": grouped(rows),
        "retrieval": searched(rows),
        "cases": [case(row) for row in rows],
    }


def summary(rows: Rows, draws: int = 10_000) -> dict[str, Any]:
    """How many rows there are, the share of right answers, and the means with their 95 % intervals over rows."""
    means: dict[str, Any] = {}
    for name in MEASURES:
        values = [vars(row)[name] for row in rows]
        means[name] = math.fsum(values) / len(values)
        means[f"{name}_low"], means[f"{name}_high"] = bootstrap(values, draws=draws)
    return {"rows": len(rows), "right": sum(row.right for row in rows) / len(rows), **means}


def _of_kind(rows: Rows, kind: str) -> dict[str, Any]:
    own = [row for row in rows if row.kind == kind]
    f1 = math.fsum(row.f1 for row in own) / len(own) if own else 0.0
    return {"rows": len(own), "share": len(own) / len(rows), "f1": f1, "means": KINDS[kind][0]}


def grouped(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows by what is asked of them, each group with its kinds; what is known of no row is left out."""
    found: dict[str, dict[str, list[AnsweredRow]]] = {}
    for row in rows:
        for by, name in row.groups.items():
            found.setdefault(by, {}).setdefault(name, []).append(row)
    known = {by: groups for by, groups in found.items() if set(groups) != {NOT_KNOWN}}
    return {by: {name: _of_group(groups[name]) for name in _ordered(groups)} for by, groups in known.items()}


def _ordered(groups: Mapping[str, Rows]) -> list[str]:
    """Ranks in their order, then the rest, the largest first."""
    return sorted(groups, key=lambda name: (ORDER.get(name, len(ORDER)), -len(groups[name]), name))


def _of_group(rows: Rows) -> dict[str, Any]:
    counts = Counter(row.kind for row in rows)
    return {**summary(rows, DRAWS), "mistakes": {kind: counts[kind] for kind in KINDS if counts[kind]}}


def searched(rows: Rows) -> dict[str, Any]:
    """How well the search did on rows that know the right documents; nothing where none was searched for."""
    deepest = max(len(row.record["found"]) for row in rows)
    if not deepest:
        return {}
    scores = RetrievalScores([k for k in KS if k <= deepest])
    for row in rows:
        if row.gold:
            scores.add(row.found, row.gold)
    ends = scores.intervals()
    measured = {
        name: {"mean": mean, "low": ends[name][0], "high": ends[name][1]} for name, mean in scores.means().items()
    }
    return {"rows": len(scores), "measures": measured} if measured else {}


def case(row: AnsweredRow) -> dict[str, Any]:
    """What was made out of a row."""
    return {
        "row": row.number, "mistake": row.kind, "exact_match": row.exact_match, "f1": row.f1, **row.groups,
        "several gold": len(set(row.gold)) > 1,
    }  # fmt: skip


def compared(rows: Rows, others: Rows) -> dict[str, Any]:
    """A run beside another on the rows that both have: differences with 95 % intervals over rows, by resampling pairs.

    Args:
        rows: Of the one.
        others: Of the other, which is taken off it.

    Raises:
        ValueError: If a row asks something else in the other run, or no row is in both.
    """
    pairs = paired(rows, others)
    changed = Counter((b.kind, a.kind) for a, b in pairs)
    return {
        "rows": len(pairs),
        "left_out": {"of_this": len(rows) - len(pairs), "of_the_other": len(others) - len(pairs)},
        **{name: _difference([(vars(a)[name], vars(b)[name]) for a, b in pairs]) for name in MEASURES},
        "kinds": [{"other": b, "this": a, "rows": changed[b, a]} for b in KINDS for a in KINDS if changed[b, a]],
    }


def paired(rows: Rows, others: Rows) -> list[tuple[AnsweredRow, AnsweredRow]]:
    """The rows of two runs by their numbers.

    Raises:
        ValueError: If a row asks something else in the other run, or no row is in both.
    """
    by_number = {row.number: row for row in others}
    pairs = [(row, by_number[row.number]) for row in rows if row.number in by_number]
    if not pairs:
        raise ValueError("no row is in both runs, so there is nothing to compare; test both on the same rows")
    for one, other in pairs:
        if _asked(one) != _asked(other):
            raise ValueError(
                f"row {one.number} asks {_asked(one)[0]!r} (target {_asked(one)[1]!r}) in the one run and "
                f"{_asked(other)[0]!r} (target {_asked(other)[1]!r}) in the other; test both on the same rows"
            )
    return pairs


def _asked(row: AnsweredRow) -> tuple[Any, Any]:
    return row.record["question"], row.record.get("target")


def _difference(values: Sequence[tuple[float, float]]) -> dict[str, Any]:
    differences = [a - b for a, b in values]
    low, high = bootstrap(differences)
    return {
        "this": math.fsum(a for a, _ in values) / len(values),
        "other": math.fsum(b for _, b in values) / len(values),
        "difference": math.fsum(differences) / len(values),
        "low": low,
        "high": high,
        "better": sum(d > 0 for d in differences),
        "worse": sum(d < 0 for d in differences),
    }
