"""The analysis of a test as one HTML page, which needs no other file: tables, plots, and answers of each kind."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.error_tables import Table, tables
from lightning_softprompt.reports.error_types import KINDS, AnsweredRow
from lightning_softprompt.reports.html import article, folded, marked, page
from lightning_softprompt.system.printable import html_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, LINE = "#8fb3d9", "#1f4e8c"


def analysis_page(name: str, told: Mapping[str, Any], rows: Sequence[AnsweredRow], examples: int) -> str:
    """The page.

    Args:
        name: The run's.
        told: As `analysis` gives it.
        rows: The rows that it is of.
        examples: How many answers of each kind are shown: the first.
    """
    drawn = {"Answers by kind": kinds_figure(told["mistakes"])}
    drawn |= {f"F1 by {by}": group_figure(by, of) for by, of in told["groups"].items()}
    body = "".join(map(_table, tables(told)))
    body += "".join(_image(title, figure) for title, figure in drawn.items())
    body += "".join(_answers(kind, rows, examples) for kind in KINDS)
    return page(f"Answers of {name}", body)


def _table(table: Table) -> str:
    head = "".join(f"<th>{html_text(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr>{''.join(f'<td>{html_text(cell)}</td>' for cell in cells)}</tr>" for cells in table.rows)
    return f"<h2>{html_text(table.title)}</h2><table><tr>{head}</tr>{body}</table>"


def _image(title: str, figure: Figure) -> str:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110)
    coded = b64encode(image.getvalue()).decode()
    return f'<h2>{html_text(title)}</h2><p><img alt="{html_text(title)}" src="data:image/png;base64,{coded}"></p>'


def _answers(kind: str, rows: Sequence[AnsweredRow], examples: int) -> str:
    own = [row for row in rows if row.kind == kind]
    if not own:
        return ""
    shown = "".join(_answer(row) for row in own[:examples])
    return (
        f"<h2>{html_text(kind)} ({min(examples, len(own))} of {len(own)})</h2><p>{html_text(KINDS[kind][0])}</p>{shown}"
    )


def _answer(row: AnsweredRow) -> str:
    right = " / ".join(row.references)
    several = f", {len(set(row.gold))} gold documents" if len(set(row.gold)) > 1 else ""
    heading = f"row {row.number}: exact_match {row.exact_match:g}, f1 {row.f1:.3g}, gold rank {row.gold_rank}{several}"
    texts = {
        "question": html_text(str(row.record["question"] or "")),
        "right": marked(right, row.answer) if right else "nothing: there is no answer",
        "prediction": marked(row.answer, right),
        **dict(_passages(row, right)),
    }
    return article(heading, texts)


def _passages(row: AnsweredRow, right: str) -> Iterator[tuple[str, str]]:
    for place, (passage, good) in enumerate(zip(row.passages, row.right_passages, strict=True), start=1):
        rank = "put in" if passage["rank"] is None else f"found as {passage['rank'] + 1}"
        name = f"passage {place}: {passage['document']} ({rank}{', right' if good else ''})"
        yield name, folded(passage["text"], f"{right} {row.answer}")


def kinds_figure(mistakes: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How many answers there are of each kind."""
    figure, axes = _drawing(len(mistakes))
    bars = axes.barh(list(mistakes), [of["rows"] for of in mistakes.values()], color=BAR)
    axes.bar_label(bars, [f"{of['rows']} ({100 * of['share']:.0f} %)" for of in mistakes.values()], padding=3)
    axes.set_xlabel("rows")
    axes.margins(x=0.15)
    return figure


def group_figure(by: str, groups: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The mean F1 of each group of rows, with its 95 % interval."""
    figure, axes = _drawing(len(groups))
    names = [f"{name} ({of['rows']})" for name, of in groups.items()]
    means = [of["f1"] for of in groups.values()]
    ends = [[of["f1"] - of["f1_low"] for of in groups.values()], [of["f1_high"] - of["f1"] for of in groups.values()]]
    inside = [[max(0.0, length) for length in lengths] for lengths in ends]  # rounding may put an end past the mean
    axes.barh(names, means, xerr=inside, color=BAR, ecolor=LINE, capsize=3)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("F1, with 95 % intervals over rows")
    axes.set_ylabel(f"{by} (rows)")
    return figure


def _drawing(bars: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.35 * bars), layout="constrained")
    axes = figure.subplots()
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
