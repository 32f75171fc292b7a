"""The tables of an analysis, as text in cells: for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table.

    Args:
        title: What it is of.
        header: Names of the columns.
        rows: Cells of each row.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


OF_GROUPS = ["rows", "right", "exact match", "F1 (95 %)"]


def tables(told: Mapping[str, Any]) -> Iterator[Table]:
    """The tables of what `analysis` gave, and of `against`, a comparison, where it has one."""
    yield Table("All answers", OF_GROUPS, [_of_group(told)])
    mistakes = [[kind, *_of_kind(of)] for kind, of in told["mistakes"].items()]
    yield Table("By kind", ["kind", "rows", "share", "mean F1", "what it is"], mistakes)
    for by, groups in told["groups"].items():
        rows = [[name, *_of_group(of), _main_mistake(of["mistakes"])] for name, of in groups.items()]
        yield Table(f"By {by}", [by, *OF_GROUPS, "most frequent mistake"], rows)
    if told["retrieval"]:
        rows = [[name, _interval(of, "mean")] for name, of in told["retrieval"]["measures"].items()]
        yield Table(f"What was found, for {told['retrieval']['rows']} questions", ["measure", "mean (95 %)"], rows)
    if "against" in told:
        yield from _comparison(told["against"])


def _of_group(of: Mapping[str, Any]) -> list[str]:
    ends = {"low": of["f1_low"], "high": of["f1_high"], "f1": of["f1"]}
    return [str(of["rows"]), f"{of['right']:.3f}", f"{of['exact_match']:.3f}", _interval(ends, "f1")]


def _of_kind(of: Mapping[str, Any]) -> list[str]:
    return [str(of["rows"]), f"{of['share']:.3f}", f"{of['f1']:.3f}", of["means"]]


def _interval(of: Mapping[str, Any], mean: str, sign: str = "") -> str:
    return f"{of[mean]:{sign}.3f} [{of['low']:{sign}.3f}, {of['high']:{sign}.3f}]"


def _main_mistake(counts: Mapping[str, int]) -> str:
    wrong = {kind: count for kind, count in counts.items() if kind != "right"}
    if not wrong:
        return ""
    kind = max(wrong, key=wrong.__getitem__)
    return f"{kind} ({wrong[kind]})"


def _comparison(told: Mapping[str, Any]) -> Iterator[Table]:
    rows = [_of_difference(name, told[name]) for name in ("exact_match", "f1")]
    header = ["measure", "this run", "the other", "difference (95 %)", "better rows", "worse rows"]
    left = told["left_out"]
    lost = f"; {left['of_this']} and {left['of_the_other']} rows are in one run alone" if any(left.values()) else ""
    yield Table(f"Beside {told['run']}, on {told['rows']} rows of both{lost}", header, rows)
    moved = [[of["other"], of["this"], str(of["rows"])] for of in told["kinds"] if of["other"] != of["this"]]
    if moved:
        yield Table("Rows whose kind changed", ["the other", "this run", "rows"], moved)


def _of_difference(name: str, of: Mapping[str, Any]) -> list[str]:
    means = [f"{of['this']:.3f}", f"{of['other']:.3f}", _interval(of, "difference", "+")]
    return [name.replace("_", " "), *means, str(of["better"]), str(of["worse"])]
