"""An error analysis as a self-contained HTML page: tables, plots, and examples of each kind of answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.error_tables import tables
from lightning_softprompt.reports.error_types import KINDS, AnsweredRow
from lightning_softprompt.reports.html import article, collapse, contents, highlight, image, page, section, table
from lightning_softprompt.system.printable import html_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Mapping[str, Any]
BAR_COLOR, INTERVAL_COLOR = "#8fb3d9", "#1f4e8c"


def analysis_page(name: str, analysis: Values, rows: Sequence[AnsweredRow], num_examples: int, note: str = "") -> str:
    """Returns the page.

    Args:
        name: Name of the run.
        analysis: The result of `analyze`.
        rows: The analyzed rows.
        num_examples: Maximum number of answers to show of each kind; the first ones are shown.
        note: Text below the title.
    """
    figures = _figures(analysis)
    sections = {}
    for each in tables(analysis):
        figure = figures.get(each.title)
        plot = "" if figure is None else image(each.title, figure)
        sections[each.title] = section(each.title, table(each.header, each.rows) + plot)
    for kind in KINDS:
        rows_of_kind = [row for row in rows if row.kind == kind]
        if rows_of_kind:
            title = f"{kind} ({min(num_examples, len(rows_of_kind))} of {len(rows_of_kind)})"
            description, _ = KINDS[kind]
            examples = "".join(_example(row) for row in rows_of_kind[:num_examples])
            sections[title] = section(title, examples, description)
    top = f'<p class="note">{html_text(note)}</p>{contents(list(sections))}'
    return page(f"Answers of {name}", top + "".join(sections.values()))


def _figures(analysis: Values) -> dict[str, Figure]:
    """Returns the plots by the title of the table with the same numbers; a plot has at least two bars."""
    figures = {"By kind": kinds_figure(analysis["kinds"])}
    for group_by, groups in analysis["groups"].items():
        if len(groups) > 1 and any(group["f1"] > 0 for group in groups.values()):
            figures[f"By {group_by}"] = groups_figure(groups)
    return figures


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
    labels = [f"{kind['rows']} ({kind['share']:.0%})".replace("%", " %") for kind in kinds.values()]
    axes.bar_label(bars, labels, padding=3)
    axes.set_xlabel("rows")
    axes.margins(x=0.15)
    return figure


def groups_figure(groups: Mapping[str, Values]) -> Figure:
    """Returns a bar plot of the mean F1 of each group of rows, with 95 % intervals."""
    figure, axes = _bar_axes(len(groups))
    names = [f"{name} ({group['rows']})" for name, group in groups.items()]
    means = [group["f1"] for group in groups.values()]
    # after rounding, an end of the interval may be on the other side of the mean, but lengths must not be negative
    below = [max(0.0, group["f1"] - group["f1_low"]) for group in groups.values()]
    above = [max(0.0, group["f1_high"] - group["f1"]) for group in groups.values()]
    axes.barh(names, means, xerr=[below, above], color=BAR_COLOR, ecolor=INTERVAL_COLOR, capsize=3)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("F1, with 95 % intervals over rows (number of rows in brackets)")
    return figure


def _bar_axes(num_bars: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.35 * num_bars), layout="constrained")
    axes = figure.subplots()
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
