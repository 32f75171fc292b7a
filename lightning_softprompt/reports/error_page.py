"""An error analysis as a self-contained HTML page: tables, plots, and examples of each kind of answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.error_tables import Table, tables
from lightning_softprompt.reports.error_types import KINDS, AnsweredRow
from lightning_softprompt.reports.html import article, collapse, highlight, image, page
from lightning_softprompt.system.printable import html_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Mapping[str, Any]
BAR_COLOR, INTERVAL_COLOR = "#8fb3d9", "#1f4e8c"


def analysis_page(name: str, analysis: Values, rows: Sequence[AnsweredRow], num_examples: int) -> str:
    """Returns the page.

    Args:
        name: Name of the run.
        analysis: The result of `analyze`.
        rows: The analyzed rows.
        num_examples: Maximum number of answers to show of each kind; the first ones are shown.
    """
    figures = {"Answers by kind": kinds_figure(analysis["kinds"])}
    for group_by, groups in analysis["groups"].items():
        figures[f"F1 by {group_by}"] = groups_figure(group_by, groups)
    sections = [_table_section(table) for table in tables(analysis)]
    for title, figure in figures.items():
        sections.append(f"<h2>{html_text(title)}</h2>{image(title, figure)}")
    for kind in KINDS:
        rows_of_kind = [row for row in rows if row.kind == kind]
        if rows_of_kind:
            sections.append(_examples_section(kind, rows_of_kind, num_examples))
    return page(f"Answers of {name}", "".join(sections))


def _table_section(table: Table) -> str:
    rows = [_table_row("th", table.header), *(_table_row("td", row) for row in table.rows)]
    return f"<h2>{html_text(table.title)}</h2><table>{''.join(rows)}</table>"


def _table_row(tag: str, cells: Sequence[str]) -> str:
    content = "".join(f"<{tag}>{html_text(cell)}</{tag}>" for cell in cells)
    return f"<tr>{content}</tr>"


def _examples_section(kind: str, rows: Sequence[AnsweredRow], num_examples: int) -> str:
    description, _ = KINDS[kind]
    examples = rows[:num_examples]
    heading = f"<h2>{html_text(kind)} ({len(examples)} of {len(rows)})</h2>"
    return f"{heading}<p>{html_text(description)}</p>{''.join(_example(row) for row in examples)}"


def _example(row: AnsweredRow) -> str:
    references = " / ".join(row.references)
    scores = f"exact_match {row.exact_match:g}, f1 {row.f1:.3g}"
    heading = f"row {row.number}: {scores}, gold rank {row.gold_rank}"
    num_gold = len(set(row.gold))
    if num_gold > 1:
        heading += f", {num_gold} gold documents"
    entries = {
        "question": html_text(str(row.record["question"] or "")),
        "correct answer": highlight(references, row.answer) if references else "none: the question has no answer",
        "prediction": highlight(row.answer, references),
    }
    for position, is_relevant in enumerate(row.passage_is_relevant, start=1):
        passage = row.passages[position - 1]
        notes = "added" if passage["rank"] is None else f"rank {passage['rank'] + 1}"
        if is_relevant:
            notes += ", relevant"
        name = f"passage {position}: {passage['document']} ({notes})"
        entries[name] = collapse(passage["text"], f"{references} {row.answer}")
    return article(heading, entries)


def kinds_figure(kinds: Mapping[str, Values]) -> Figure:
    """Returns a bar plot of the number of answers of each kind."""
    figure, axes = _bar_axes(len(kinds))
    counts = [kind["rows"] for kind in kinds.values()]
    bars = axes.barh(list(kinds), counts, color=BAR_COLOR)
    labels = [f"{kind['rows']} ({100 * kind['share']:.0f} %)" for kind in kinds.values()]
    axes.bar_label(bars, labels, padding=3)
    axes.set_xlabel("rows")
    axes.margins(x=0.15)
    return figure


def groups_figure(group_by: str, groups: Mapping[str, Values]) -> Figure:
    """Returns a bar plot of the mean F1 of each group of rows, with 95 % intervals."""
    figure, axes = _bar_axes(len(groups))
    names = [f"{name} ({group['rows']})" for name, group in groups.items()]
    means = [group["f1"] for group in groups.values()]
    # after rounding, an end of the interval may be on the other side of the mean, but lengths must not be negative
    below = [max(0.0, group["f1"] - group["f1_low"]) for group in groups.values()]
    above = [max(0.0, group["f1_high"] - group["f1"]) for group in groups.values()]
    axes.barh(names, means, xerr=[below, above], color=BAR_COLOR, ecolor=INTERVAL_COLOR, capsize=3)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("F1, with 95 % intervals over rows")
    axes.set_ylabel(f"{group_by} (rows)")
    return figure


def _bar_axes(num_bars: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.35 * num_bars), layout="constrained")
    axes = figure.subplots()
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
