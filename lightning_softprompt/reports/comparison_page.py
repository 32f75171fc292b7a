"""A comparison of runs as one HTML page, which needs no other file and makes no network request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_softprompt.reports.comparison import (
    ComparedRun,
    Difference,
    Scores,
    differing_settings,
    disagreeing_rows,
    paired_differences,
)
from lightning_softprompt.reports.comparison_plots import cost_figures, curve_figures
from lightning_softprompt.reports.experiments import Comparison, Experiment
from lightning_softprompt.reports.html import contents, image, page, section, table
from lightning_softprompt.system.printable import html_text

MAX_COLUMNS = 8  # runs side by side, as columns of a table
SHORT_COMMIT = 7  # characters of a git commit
STYLE = "<style>body { max-width: 75rem }</style>"
COLUMNS: Mapping[str, Callable[[ComparedRun], Any]] = {  # those with the same value in all runs are named in the note
    "data": lambda run: run.summary.data,
    "backbone": lambda run: Path(run.summary.backbone).name,
    "commit": lambda run: run.summary.commit[:SHORT_COMMIT],
}


def comparison_page(comparison: Comparison, baseline: ComparedRun | None, examples: int, note: str = "") -> str:
    """Builds the page. All texts of the runs' files are escaped.

    Args:
        comparison: The runs.
        baseline: The run whose experiment the others are compared with row by row; None for no such comparison.
        examples: Maximum number of rows whose predictions are shown side by side.
        note: Text below the title.
    """
    sections = {
        "Experiments": _experiments_section(comparison),
        "Paired differences": "" if baseline is None else _differences_section(comparison, baseline),
        "Learning curves": _curves_section(comparison),
        "Score and cost": _cost_section(comparison),
        "Runs": _runs_section(comparison),
        "Settings that differ": _settings_section(comparison),
        "Predictions side by side": _examples_section(comparison, examples),
    }
    sections = {title: content for title, content in sections.items() if content}
    body = f'{STYLE}<p class="note">{html_text(note)}</p>{contents(list(sections))}'
    body += "".join(sections.values())
    return page(f"Comparison of {len(comparison.runs)} runs", body)


def _experiments_section(comparison: Comparison) -> str:
    if not any(len(experiment.runs) > 1 for experiment in comparison.experiments):
        return ""
    rows = []
    for experiment in comparison.experiments:
        test = None
        if experiment.tests:
            spread = f" ± {experiment.half_width:.3g}" if len(experiment.tests) > 1 else ""
            test = f"{experiment.metric} {experiment.mean:.4g}{spread}"
        minutes = [run.summary.minutes for run in experiment.runs if run.summary.minutes is not None]
        mean_minutes = sum(minutes) / len(minutes) if minutes else None
        cost = [_format_count(experiment.runs[0].summary.trainable_parameters), _format_minutes(mean_minutes)]
        rows.append([experiment.name, _count_runs(experiment), *cost, test])
    note = (
        "An experiment has the runs that differ only in their seeds. ± is half the width of the 95 % interval of the "
        "mean over these runs (Student's t)."
    )
    return section("Experiments", table(["experiment", "runs", "parameters", "minutes", "test"], rows), note)


def _count_runs(experiment: Experiment) -> str:
    """The number of runs; if some of them have no test, also the number of tested runs."""
    tested, count = len(experiment.tests), len(experiment.runs)
    return f"{tested} of {count} tested" if 0 < tested < count else str(count)


def _differences_section(comparison: Comparison, baseline: ComparedRun) -> str:
    """Compares experiments with that of the baseline, and single runs with the baseline if there are repetitions."""
    reference = comparison.experiment_of(baseline)
    by_experiment: dict[str, Scores] = {}
    by_run: dict[str, Scores] = {}
    for experiment in comparison.experiments:
        has_metric = experiment.metric == reference.metric
        if experiment is not reference:
            by_experiment[experiment.name] = experiment.scores if has_metric else {}
        for run in experiment.runs:
            if run is not baseline:
                by_run[comparison.name(run)] = run.scores if has_metric else {}
    content = _differences_table("experiment", by_experiment, reference.scores)
    if len(comparison.experiments) < len(comparison.runs):
        summary = f"Differences of single runs from {html_text(comparison.name(baseline))}"
        content += (
            f"<details><summary>{summary}</summary>{_differences_table('run', by_run, baseline.scores)}</details>"
        )
    note = (
        f"Test score minus that of {reference.name}, row by row; the scores of a row are averaged over the runs of an "
        "experiment. Intervals: 95 % bootstrap over rows. p: sign-flip test; the adjusted p is corrected for the "
        "number of comparisons in the table (Holm). Both are about the test rows and do not cover the variation over "
        "seeds."
    )
    return section("Paired differences", content, note)


def _differences_table(kind: str, scores: Mapping[str, Scores], baseline: Scores) -> str:
    differences = paired_differences(scores, baseline)
    rows = [_differences_row(each) for each in sorted(differences, key=lambda each: each.mean, reverse=True)]
    header = [kind, "difference", "95 % interval", "p", "adjusted p", "rows"]
    content = table(header, rows) if rows else ""
    if left_out := len(scores) - len(differences):
        content += f'<p class="note">Not compared, without a test with the same rows and metric: {left_out}.</p>'
    return content


def _differences_row(difference: Difference) -> list[object]:
    low, high = difference.interval
    mean = f"{round(difference.mean, 4) + 0.0:+.4f}"  # adding 0.0 turns -0.0 into +0.0
    interval = f"[{low:+.4f}, {high:+.4f}]"
    p, adjusted = f"{difference.p:.4f}", f"{difference.adjusted:.4f}"
    return [difference.name, mean, interval, p, adjusted, difference.rows]


def _curves_section(comparison: Comparison) -> str:
    images = [image(title, figure) for title, figure in curve_figures(comparison)]
    return section("Learning curves", "".join(images), "Validation during training.") if images else ""


def _cost_section(comparison: Comparison) -> str:
    images = [image(title, figure) for title, figure in cost_figures(comparison)]
    note = (
        "Test scores by the time of training on the machine of each run, and by the number of trainable parameters. "
        "Each point is a run; a dashed line is a run without training."
    )
    return section("Score and cost", "".join(images), note) if images else ""


def _runs_section(comparison: Comparison) -> str:
    common: list[str] = []
    columns = dict(COLUMNS)
    for name, get in COLUMNS.items():
        values = {str(get(run)) for run in comparison.runs}
        if len(values) == 1:
            common.extend(f"{name} {value}" for value in values if value)
            del columns[name]
    rows = []
    for run in comparison.runs:
        summary = run.summary
        cost = [_format_count(summary.trainable_parameters), summary.steps, _format_minutes(summary.minutes)]
        values_of_run = [get(run) or None for get in columns.values()]
        started = summary.started or None
        rows.append([comparison.name(run), *values_of_run, *cost, summary.validation, run.test, started, run.folder])
    header = ["run", *columns, "parameters", "steps", "minutes", "best validation", "test", "started", "folder"]
    note = "Brackets contain 95 % intervals over the rows of a test: Wilson for shares, bootstrap for other means."
    if common:
        note += f" The same in all runs: {', '.join(common)}."
    return section("Runs", table(header, rows), note)


def _format_count(count: int | None) -> str | None:
    return None if count is None else f"{count:,}"


def _format_minutes(minutes: float | None) -> str | None:
    if minutes is None:
        return None
    return f"{minutes:.2f}" if minutes < 1 else f"{minutes:.1f}"


def _settings_section(comparison: Comparison) -> str:
    """Shows runs as rows, or as columns if there are few runs with many settings."""
    differing = differing_settings(comparison.runs)
    if not differing:
        return ""
    names = [comparison.name(run) for run in comparison.runs]
    if len(names) <= MAX_COLUMNS and len(differing) > len(names):
        content = table(["setting", *names], [[name, *values] for name, values in differing.items()])
    else:
        values_of_runs = zip(*differing.values(), strict=True)
        rows = [[name, *values] for name, values in zip(names, values_of_runs, strict=True)]
        content = table(["run", *differing], rows)
    return section("Settings that differ", content, "All other settings are equal.")


def _examples_section(comparison: Comparison, limit: int) -> str:
    """Shows for each data set the predictions of one run of each experiment, then of further runs."""
    first = [_first_tested(experiment) for experiment in comparison.experiments]
    others = [run for run in comparison.runs if run not in first]
    runs_by_data: dict[str, list[ComparedRun]] = {}
    for run in (*first, *others):
        if run is not None and run.records:
            runs_by_data.setdefault(run.summary.data, []).append(run)
    content = "".join(_examples_table(comparison, data, runs, limit) for data, runs in runs_by_data.items())
    return section("Predictions side by side", content) if content else ""


def _examples_table(comparison: Comparison, data: str, runs: Sequence[ComparedRun], limit: int) -> str:
    shown = runs[:MAX_COLUMNS]
    rows = []
    for record, predictions in disagreeing_rows(shown, limit):
        target = record.get("target")
        marked = [_mark(prediction, target) for prediction in predictions]
        rows.append([record.get("row"), record.get("input"), target, *marked])
    if not rows:
        return ""
    which = "the runs" if len(shown) == len(runs) else f"{len(shown)} of the {len(runs)} tested runs"
    note = f"The first {len(rows)} test rows of {data} that {which} answer differently. ✓: equal to the target."
    header = ["row", "input", "target", *map(comparison.name, shown)]
    return f'<p class="note">{html_text(note)}</p>{table(header, rows)}'


def _first_tested(experiment: Experiment) -> ComparedRun | None:
    return next((run for run in experiment.runs if run.records), None)


def _mark(prediction: Any, target: Any) -> Any:
    return f"{prediction} ✓" if prediction is not None and prediction == target else prediction
