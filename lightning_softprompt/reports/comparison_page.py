"""A comparison of runs as one HTML page, which needs no other file and makes no network request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.comparison import (
    ComparedRun,
    Difference,
    Group,
    differing_settings,
    disagreeing_rows,
    group_repetitions,
    paired_differences,
)
from lightning_softprompt.reports.html import image, page
from lightning_softprompt.system.printable import html_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMED = 12  # runs that a legend names and that columns of predictions show
MAX_TEXT = 600  # characters of a text in a table
MAX_UNBROKEN = 24  # characters of a text that stays on one line
STYLE = """
<style>
body { max-width: 75rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-top: 1px solid var(--line);
  color: inherit }
th { font-weight: 600 }
td { overflow-wrap: anywhere }
td.short, th { white-space: nowrap }
</style>
"""


def comparison_page(runs: Sequence[ComparedRun], baseline: ComparedRun | None, examples: int) -> str:
    """Builds the page. All texts of the runs' files are escaped.

    Args:
        runs: The runs.
        baseline: The run that the others are compared with row by row; None for no such comparison.
        examples: Maximum number of rows whose predictions are shown side by side.
    """
    differences = [] if baseline is None else paired_differences(runs, baseline)
    parts = [
        STYLE,
        _runs_table(runs),
        _groups_table(group_repetitions(runs)),
        "" if baseline is None else _differences_table(differences, baseline, len(runs)),
        _curves(runs),
        _cost(runs),
        _settings_table(runs),
        _examples(runs, examples),
    ]
    return page(f"Comparison of {len(runs)} runs", "".join(parts))


def _section(title: str, note: str, content: str) -> str:
    return f'<h2>{html_text(title)}</h2><p>{html_text(note)}</p><div class="wide">{content}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    text = "-" if value is None else str(value)
    if len(text) <= MAX_UNBROKEN:
        return f'<td class="short" dir="auto">{html_text(text)}</td>'
    shortened = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
    return f'<td dir="auto">{html_text(shortened)}</td>'


def _runs_table(runs: Sequence[ComparedRun]) -> str:
    rows = []
    for run in runs:
        summary = run.summary
        parameters = None if summary.trainable_parameters is None else f"{summary.trainable_parameters:,}"
        minutes = None if summary.minutes is None else f"{summary.minutes:.1f}"
        rows.append([
            run.name, summary.method, summary.data, Path(summary.backbone).name, parameters, summary.steps, minutes,
            summary.validation, run.test,
        ])  # fmt: skip
    header = ["run", "method", "data", "backbone", "parameters", "steps", "minutes", "best validation", "test"]
    note = "Brackets contain 95 % intervals over the rows of a test: Wilson for shares, bootstrap for other means."
    return _section("Runs", note, _table(header, rows))


def _groups_table(groups: Sequence[Group]) -> str:
    if not any(len(group.runs) > 1 for group in groups):
        return ""
    rows = []
    for group in sorted(groups, key=lambda group: group.mean, reverse=True):
        spread = f" ± {group.half_width:.3g}" if len(group.runs) > 1 else ""
        rows.append([group.name, len(group.runs), f"{group.metric} {group.mean:.4g}{spread}"])
    note = "Runs that differ only in their seeds. ± is the half-width of the 95 % interval of the mean (Student's t)."
    return _section("Repetitions", note, _table(["experiment", "runs", "test"], rows))


def _differences_table(differences: Sequence[Difference], baseline: ComparedRun, count: int) -> str:
    rows = []
    for each in sorted(differences, key=lambda each: each.mean, reverse=True):
        low, high = each.interval
        interval = f"[{low:+.4f}, {high:+.4f}]"
        p_values = [f"{each.p:.4f}", f"{each.adjusted:.4f}"]
        rows.append([each.run, f"{each.mean:+.4f}", interval, *p_values, each.rows])
    left_out = count - 1 - len(differences)
    note = (
        f"Test score minus that of {baseline.name}, row by row. Intervals: 95 % bootstrap over rows. p: sign-flip "
        f"test, adjusted for {len(differences)} compared runs (Holm). Seeds are not part of this uncertainty."
    )
    if left_out:
        note += f" Runs without a test on the same rows with the same metric: {left_out}."
    header = ["run", "difference", "95 % interval", "p", "adjusted p", "rows"]
    return _section("Paired differences", note, _table(header, rows))


def _settings_table(runs: Sequence[ComparedRun]) -> str:
    differing = differing_settings(runs)
    if not differing:
        return ""
    rows = [[run.name, *(values[i] for values in differing.values())] for i, run in enumerate(runs)]
    return _section("Settings that differ", "All other settings are equal.", _table(["run", *differing], rows))


def _examples(runs: Sequence[ComparedRun], limit: int) -> str:
    tested = [run for run in runs if run.records][:MAX_NAMED]
    rows = [
        [record.get("row"), record.get("input"), record.get("target"), *predictions]
        for record, predictions in disagreeing_rows(tested, limit)
    ]
    if not rows:
        return ""
    note = f"The first {len(rows)} test rows that the runs answer differently."
    if len(tested) < sum(bool(run.records) for run in runs):
        note += f" The first {MAX_NAMED} tested runs are shown."
    header = ["row", "input", "target", *(run.name for run in tested)]
    return _section("Predictions side by side", note, _table(header, rows))


def _curves(runs: Sequence[ComparedRun]) -> str:
    """Draws the validation curves of the monitored metric, one plot per metric."""
    metrics = dict.fromkeys(run.summary.validation.metric for run in runs if run.summary.validation is not None)
    images = []
    for metric in metrics:
        curves = {run.name: run.curve(f"val/{metric}") for run in runs}
        images.append(image(f"{metric} by step", _draw_curves(metric, curves)))
    note = "Validation during training."
    return _section("Learning curves", note, "".join(images)) if images else ""


def _draw_curves(metric: str, curves: dict[str, list[tuple[int, float]]]) -> Figure:
    figure, axes = _start_figure()
    drawn = {name: curve for name, curve in curves.items() if curve}
    for name, curve in drawn.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, marker="o" if len(steps) < 30 else "", markersize=3, linewidth=1.2, label=_plain(name))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(_plain(metric))
    if len(drawn) <= MAX_NAMED:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _cost(runs: Sequence[ComparedRun]) -> str:
    """Draws test scores by minutes of training, one plot per metric."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        test, minutes = run.summary.test, run.summary.minutes
        if test is not None and minutes is not None:
            by_method = points.setdefault(test.metric, {})
            by_method.setdefault(run.summary.method, []).append((minutes, test.value))
    images = [image(f"{metric} by minutes", _draw_cost(metric, methods)) for metric, methods in points.items()]
    note = "Test scores by the time of training on the machine of each run. Each point is a run."
    return _section("Score and cost", note, "".join(images)) if images else ""


def _draw_cost(metric: str, methods: dict[str, list[tuple[float, float]]]) -> Figure:
    figure, axes = _start_figure()
    for method, points in methods.items():
        minutes, values = zip(*points, strict=True)
        axes.scatter(minutes, values, s=28, label=_plain(method))
    axes.set_xlabel("minutes of training")
    axes.set_ylabel(f"test {_plain(metric)}")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _plain(text: Any) -> str:
    """Text for a figure, in which matplotlib would read `$` as the start of a formula."""
    return str(text).replace("$", r"\$")


def _start_figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes
