"""The tables of an error analysis as text cells, for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Values = Mapping[str, Any]
DIFFERENCE_HEADER = ["this run", "other run", "difference (95 %)", "better rows", "worse rows"]
MEASURES = ("exact_match", "f1")
SUMMARY_HEADER = ["rows", "correct", "exact match", "F1 (95 %)"]


class Table(NamedTuple):
    """A table.

    Args:
        title: Title of the table.
        header: Names of the columns.
        rows: Cells of each row.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(analysis: Values) -> Iterator[Table]:
    """Yields the tables of an analysis, and of its comparison with another run (`against`) if it has one."""
    yield Table("All answers", SUMMARY_HEADER, [_summary_cells(analysis)])
    yield _kinds_table(analysis["kinds"])
    for group_by, groups in analysis["groups"].items():
        yield _groups_table(group_by, groups)
    if retrieval := analysis["retrieval"]:
        rows = [[name, _interval(measure, "mean")] for name, measure in retrieval["measures"].items()]
        yield Table(f"Retrieval for {retrieval['rows']} questions", ["measure", "mean (95 %)"], rows)
    if "against" in analysis:
        yield _differences_table(analysis["against"])
        for group_by, groups in analysis["against"]["groups"].items():
            yield _group_differences_table(group_by, groups)
        yield from _kind_changes_table(analysis["against"])


def _kinds_table(kinds: Mapping[str, Values]) -> Table:
    rows = []
    for kind, values in kinds.items():
        shares = [f"{values[name]:.3f}" for name in ("share", "f1")]
        rows.append([kind, str(values["rows"]), *shares, values["means"]])
    return Table("By kind", ["kind", "rows", "share", "mean F1", "description"], rows)


def _groups_table(group_by: str, groups: Mapping[str, Values]) -> Table:
    rows = [[name, *_summary_cells(group), _most_frequent_error(group["kinds"])] for name, group in groups.items()]
    return Table(f"By {group_by}", [group_by, *SUMMARY_HEADER, "most frequent error"], rows)


def _summary_cells(summary: Values) -> list[str]:
    f1 = {"mean": summary["f1"], "low": summary["f1_low"], "high": summary["f1_high"]}
    shares = [f"{summary[name]:.3f}" for name in ("correct", "exact_match")]
    return [str(summary["rows"]), *shares, _interval(f1, "mean")]


def _interval(values: Values, mean: str, sign: str = "") -> str:
    """Returns a mean with its interval; the sign `+` also shows the sign of positive numbers."""
    center, low, high = (f"{values[name]:{sign}.3f}" for name in (mean, "low", "high"))
    return f"{center} [{low}, {high}]"


def _most_frequent_error(counts: Mapping[str, int]) -> str:
    errors = {kind: count for kind, count in counts.items() if kind != "correct"}
    if not errors:
        return ""
    kind = max(errors, key=errors.__getitem__)
    return f"{kind} ({errors[kind]})"


def _differences_table(comparison: Values) -> Table:
    rows = [_difference_cells(name, comparison[name]) for name in MEASURES]
    title = f"Compared with {comparison['run']} on {comparison['rows']} common rows"
    left_out = comparison["left_out"]
    if any(left_out.values()):
        title += f"; {left_out['of_this']} and {left_out['of_the_other']} rows are in only one run"
    return Table(title, ["measure", *DIFFERENCE_HEADER], rows)


def _difference_cells(name: str, measure: Values) -> list[str]:
    means = [f"{measure[run]:.3f}" for run in ("this", "other")]
    counts = [str(measure[change]) for change in ("better", "worse")]
    return [name.replace("_", " "), *means, _interval(measure, "difference", "+"), *counts]


def _group_differences_table(group_by: str, groups: Mapping[str, Values]) -> Table:
    rows = []
    for name, group in groups.items():
        for measure in MEASURES:
            cells = _difference_cells(measure, group[measure])
            rows.append([name, str(group["rows"]), *cells])
    header = [group_by, "rows", "measure", *DIFFERENCE_HEADER]
    return Table(f"Compared by {group_by}", header, rows)


def _kind_changes_table(comparison: Values) -> Iterator[Table]:
    changes = [pair for pair in comparison["kinds"] if pair["other"] != pair["this"]]
    if changes:
        rows = [[change["other"], change["this"], str(change["rows"])] for change in changes]
        yield Table("Rows of another kind", ["other run", "this run", "rows"], rows)
