"""Error analysis of a question-answering test: by kind of answer, by group of rows, and paired with another run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.retrieval import KS, RetrievalScores
from lightning_softprompt.reports.error_types import KINDS, LAST_RANGE, RANK_RANGES, UNKNOWN, AnsweredRow

Rows = Sequence[AnsweredRow]
Pair = tuple[AnsweredRow, AnsweredRow]  # a row of this run and the same row of another one
MEASURES = ("exact_match", "f1")
GROUP_DRAWS = 2000  # bootstrap samples for each group; there are many groups
RANK_NAMES = [*(name for _, name in RANK_RANGES), LAST_RANGE]


def analyze(rows: Rows) -> dict[str, Any]:
    """Returns the analysis of at least one row, which is JSON serializable."""
    return {
        **summarize(rows),
        "kinds": summarize_kinds(rows),
        "groups": summarize_groups(rows),
        "retrieval": score_retrieval(rows),
        "cases": [describe_case(row) for row in rows],
    }


def summarize(rows: Rows, draws: int = 10_000) -> dict[str, Any]:
    """Returns the number of rows, the fraction of correct answers, and means with 95% confidence intervals over rows.

    Args:
        rows: The rows.
        draws: Number of bootstrap samples.
    """
    num_correct = sum(row.is_correct for row in rows)
    summary: dict[str, Any] = {"rows": len(rows), "correct": num_correct / len(rows)}
    for name in MEASURES:
        values = [getattr(row, name) for row in rows]
        summary[name] = math.fsum(values) / len(values)
        summary[f"{name}_low"], summary[f"{name}_high"] = bootstrap(values, draws=draws)
    return summary


def summarize_kinds(rows: Rows) -> dict[str, dict[str, Any]]:
    """Returns the number of answers of each kind that occurs, their fraction, their mean F1 and what the kind means."""
    kinds = {}
    for kind, (description, _) in KINDS.items():
        f1 = [row.f1 for row in rows if row.kind == kind]
        if f1:
            kinds[kind] = {
                "rows": len(f1),
                "share": len(f1) / len(rows),
                "f1": math.fsum(f1) / len(f1),
                "means": description,
            }
    return kinds


def summarize_groups(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the summary of each group of rows, by property; properties that are unknown for all rows are omitted."""
    rows_by_group: dict[str, dict[str, list[AnsweredRow]]] = {}
    for row in rows:
        for group_by, name in row.groups.items():
            rows_by_group.setdefault(group_by, {}).setdefault(name, []).append(row)
    summaries = {}
    for group_by, groups in rows_by_group.items():
        if set(groups) != {UNKNOWN}:
            summaries[group_by] = {name: _summarize_group(groups[name]) for name in _sort_groups(groups)}
    return summaries


def _sort_groups(groups: Mapping[str, Rows]) -> list[str]:
    """Returns ranks in ascending order, then the other groups, the largest first."""

    def key(name: str) -> tuple[int, int, str]:
        rank = RANK_NAMES.index(name) if name in RANK_NAMES else len(RANK_NAMES)
        return rank, -len(groups[name]), name

    return sorted(groups, key=key)


def _summarize_group(rows: Rows) -> dict[str, Any]:
    counts = Counter(row.kind for row in rows)
    return {**summarize(rows, GROUP_DRAWS), "kinds": {kind: counts[kind] for kind in KINDS if counts[kind]}}


def score_retrieval(rows: Rows) -> dict[str, Any]:
    """Returns retrieval metrics over the rows with gold documents; empty if nothing was retrieved or there are none."""
    most_passages = max(len(row.record["found"]) for row in rows)
    if not most_passages:
        return {}
    scores = RetrievalScores([k for k in KS if k <= most_passages])
    for row in rows:
        if row.gold:
            scores.add(row.found, row.gold)
    intervals = scores.intervals()
    measures = {}
    for name, mean in scores.means().items():
        low, high = intervals[name]
        measures[name] = {"mean": mean, "low": low, "high": high}
    return {"rows": len(scores), "measures": measures} if measures else {}


def describe_case(row: AnsweredRow) -> dict[str, Any]:
    """Returns the kind, scores and groups of a row."""
    return {
        "row": row.number,
        "kind": row.kind,
        "exact_match": row.exact_match,
        "f1": row.f1,
        **row.groups,
        "several gold": len(set(row.gold)) > 1,
    }


def compare(rows: Rows, other_rows: Rows) -> dict[str, Any]:
    """Compares two runs on the rows that both have: differences with 95% confidence intervals by paired bootstrap.

    Args:
        rows: Rows of this run.
        other_rows: Rows of the other run. Differences are this run minus the other run, over all rows and by group of
            the further properties of the rows.

    Raises:
        ValueError: If a row has another question in the other run, or the runs have no row in common.
    """
    pairs = pair_rows(rows, other_rows)
    pairs_by_group: dict[str, dict[str, list[Pair]]] = {}
    for row, other in pairs:
        for group_by, name in row.more_groups.items():
            pairs_by_group.setdefault(group_by, {}).setdefault(name, []).append((row, other))
    groups = {}
    for group_by, by_name in pairs_by_group.items():
        groups[group_by] = {name: _compare_pairs(by_name[name]) for name in sorted(by_name)}
    return {
        "left_out": {"of_this": len(rows) - len(pairs), "of_the_other": len(other_rows) - len(pairs)},
        **_compare_pairs(pairs),
        "groups": groups,
        "kinds": _count_kind_pairs(pairs),
    }


def _compare_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Returns the number of pairs of rows and the difference of each measure."""
    differences: dict[str, Any] = {"rows": len(pairs)}
    for name in MEASURES:
        values = [getattr(row, name) for row, _ in pairs]
        differences[name] = _difference(values, [getattr(other, name) for _, other in pairs])
    return differences


def _count_kind_pairs(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Returns the number of rows for each pair of kinds that occurs."""
    counts = Counter((other.kind, row.kind) for row, other in pairs)
    return [
        {"other": other, "this": this, "rows": counts[other, this]}
        for other in KINDS
        for this in KINDS
        if counts[other, this]
    ]


def pair_rows(rows: Rows, other_rows: Rows) -> list[Pair]:
    """Pairs the rows of two runs by number.

    Raises:
        ValueError: If a row has another question in the other run, or the runs have no row in common.
    """
    other_by_number = {row.number: row for row in other_rows}
    pairs = [(row, other_by_number[row.number]) for row in rows if row.number in other_by_number]
    if not pairs:
        raise ValueError("the runs have no row in common, so they cannot be compared; test both on the same rows")
    for row, other in pairs:
        question, target = _question_and_target(row)
        other_question, other_target = _question_and_target(other)
        if (question, target) != (other_question, other_target):
            raise ValueError(
                f"row {row.number} has the question {question!r} (target {target!r}) in one run and {other_question!r} "
                f"(target {other_target!r}) in the other; test both on the same rows"
            )
    return pairs


def _question_and_target(row: AnsweredRow) -> tuple[Any, Any]:
    return row.record["question"], row.record.get("target")


def _difference(values: Sequence[float], other_values: Sequence[float]) -> dict[str, Any]:
    """Returns the means of paired values and of their differences."""
    differences = [value - other for value, other in zip(values, other_values, strict=True)]
    low, high = bootstrap(differences)
    return {
        "this": math.fsum(values) / len(values),
        "other": math.fsum(other_values) / len(values),
        "difference": math.fsum(differences) / len(values),
        "low": low,
        "high": high,
        "better": sum(difference > 0 for difference in differences),
        "worse": sum(difference < 0 for difference in differences),
    }
