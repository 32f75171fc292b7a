"""What the runs in a folder were and how well they score, read from their files: one `RunSummary` per run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_softprompt.evaluation.metrics.intervals import bootstrap, share_interval
from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.system.plain_yaml import read_yaml

CONFIG, METRICS, RECORD = "config.yaml", "metrics.json", "run.json"
# of a test without a monitored metric
MAIN_METRICS = ("accuracy", "f1", "macro_f1", "rougeL", "bleu", "bits_per_byte", "cross_entropy", "loss")
TOLERANCE = 1e-4  # between a metric and the mean of the scores in the predictions, which have six digits
MAX_BYTES = 256 * 2**20  # of a file of predictions that is read for an interval

Values = Mapping[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """A metric of a run.

    Args:
        metric: Its name, without the stage.
        value: Its value.
        interval: Its 95 % interval over rows; None if the files of the run do not determine it.
    """

    metric: str
    value: float
    interval: Interval | None = None

    def __str__(self) -> str:
        text = f"{self.metric} {self.value:.4g}"
        if self.interval is None:
            return text
        low, high = self.interval
        return f"{text} [{low:.4g}, {high:.4g}]"


@dataclass(frozen=True)
class RunSummary:
    """A run, as its folder describes it. Values that the files do not contain are empty or None.

    Args:
        folder: The folder of the run.
        method: Class of the method.
        data: The data: name of its folder or file, or else the class of the data module.
        backbone: Name of the backbone.
        started: Local time of the last start.
        trainable_parameters: Number of trainable parameters.
        steps: Number of optimizer steps.
        minutes: Minutes of training.
        validation: The best validation.
        test: The main metric of the test: the monitored metric, if the test has it.
        source: The checkpoint or prompt that the run started from; None if it started untrained.
        test_folder: The folder with the predictions of the test; None without a test.
        commit: Git commit at the last start; empty outside a repository.
    """

    folder: Path
    method: str = ""
    data: str = ""
    backbone: str = ""
    started: str = ""
    trainable_parameters: int | None = None
    steps: int | None = None
    minutes: float | None = None
    validation: Score | None = None
    test: Score | None = None
    source: Path | None = None
    test_folder: Path | None = None
    commit: str = ""


def find_runs(folder: Path, with_intervals: bool = True) -> list[RunSummary]:
    """Reads all runs below a folder.

    The evaluation of a checkpoint or prompt has a folder of its own. It is not listed if the run that it belongs to is
    below the folder, too. That run then has its test, if both have the same data; tests on other data are listed.

    Args:
        folder: The folder.
        with_intervals: Whether tests have intervals. If a test stored none, its predictions are read for it.
    """
    runs = [read_run(path, with_intervals) for path in sorted(_run_folders(folder))]
    trained = {run.folder.resolve(): run for run in runs if run.steps}
    tests_of_runs: dict[Path, RunSummary] = {}
    others = []
    for run in sorted(runs, key=lambda run: run.started):  # of several tests, a run has the last one
        owner = _find_owner(run, trained)
        if owner is None or (run.test is not None and run.data != trained[owner].data):
            others.append(run)
        elif run.test is not None:
            tests_of_runs[owner] = run
    others.sort(key=lambda run: run.folder)
    return [_add_test(run, tests_of_runs.get(run.folder.resolve())) for run in others]


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if CONFIG in files and (METRICS in files or RECORD in files):
            folders.clear()  # folders inside a run are not runs
            yield Path(place)


def _find_owner(run: RunSummary, trained: Mapping[Path, RunSummary]) -> Path | None:
    """Returns the folder of the trained run that a test belongs to; None for other runs."""
    if run.steps or run.source is None:
        return None
    return next((path for path in run.source.parents if path in trained), None)


def _add_test(run: RunSummary, test: RunSummary | None) -> RunSummary:
    if test is None or run.test is not None:
        return run
    return replace(run, test=test.test, test_folder=test.test_folder)


def read_run(folder: Path, with_interval: bool = True) -> RunSummary:
    """Reads one run.

    Args:
        folder: The folder of the run.
        with_interval: Whether the test has its interval. If it stored none, its predictions are read for it.

    Raises:
        ValueError: If a file of the run cannot be read, naming it.
    """
    config = _as_mapping(read_yaml(folder / CONFIG), folder / CONFIG)
    report = _read_json(folder / METRICS)
    record = _read_json(folder / RECORD)
    best = report.get("best") or {}
    monitored = str(best.get("metric", "")).removeprefix("val/")
    tested = report.get("test") or {}
    test = _select_test_metric(tested, monitored)
    if test is not None and with_interval:
        interval = _stored_interval(tested, test.metric) or _find_interval(folder / PREDICTIONS, test)
        test = replace(test, interval=interval)
    validation = Score(monitored, float(best["value"])) if _is_number(best.get("value")) else None
    seconds = report.get("seconds", math.nan)
    return RunSummary(
        folder,
        method=_class_name(config.get("model")),
        data=_name_data(config.get("data")),
        backbone=str((config.get("backbone") or {}).get("name", "")),
        started=str(record.get("started", "")),
        trainable_parameters=report.get("trainable_parameters"),
        steps=report.get("global_step"),
        minutes=seconds / 60 if _is_number(seconds) else None,
        validation=validation,
        test=test,
        test_folder=None if test is None else folder,
        source=(folder / str(record["source"])).resolve() if record.get("source") else None,
        commit=str(record.get("commit", "")),
    )


def _as_mapping(value: Any, path: Path) -> Values:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must contain a mapping, got {type(value).__name__}")
    return value


def _read_json(path: Path) -> Values:
    """Reads a JSON file; without the file, an empty mapping."""
    if not path.is_file():
        return {}
    try:
        return _as_mapping(json.loads(path.read_bytes()), path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _class_name(component: Any) -> str:
    path = component.get("class_path") if isinstance(component, Mapping) else component
    return str(path or "").rpartition(".")[2]


def _name_data(data: Any) -> str:
    arguments = data.get("init_args") if isinstance(data, Mapping) else None
    arguments = arguments if isinstance(arguments, Mapping) else {}
    if isinstance(arguments.get("tasks"), Mapping):
        return ", ".join(map(str, arguments["tasks"]))
    sources = [arguments.get(name) for name in ("path", "train", "test")]
    source = next((source for source in sources if isinstance(source, str)), None)
    return Path(source).name if source else _class_name(data)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _select_test_metric(metrics: Values, monitored: str) -> Score | None:
    """Returns the monitored metric of a test, or else the first of the main metrics that the test has."""
    values = {name.removeprefix("test/"): value for name, value in metrics.items() if _is_number(value)}
    for name in (monitored, *MAIN_METRICS, *values):
        if name in values:
            return Score(name, float(values[name]))
    return None


def _stored_interval(metrics: Values, metric: str) -> Interval | None:
    """Returns the interval that a test computed."""
    bounds: list[Any] = [metrics.get(f"test/{metric}_{end}") for end in ("low", "high")]
    if not all(map(_is_number, bounds)):
        return None
    low, high = map(float, bounds)
    return low, high


def _find_interval(path: Path, score: Score) -> Interval | None:
    """Computes the interval of a metric that is a mean over rows from the predictions of a test."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    return score_interval(row_scores(read_predictions(path), score), score)


def score_interval(values: Sequence[float], score: Score) -> Interval | None:
    """Computes the 95 % interval of a metric from the scores of rows; None without scores."""
    if not values:
        return None
    if set(values) <= {0.0, 1.0}:
        return share_interval(score.value, len(values))
    return bootstrap(values, draws=2000)


def row_scores(records: Sequence[Values], score: Score) -> list[float]:
    """Returns the score of each row whose mean is a metric.

    The list is empty if the records have no such scores, or if their mean is not the metric, as for macro F1.
    """
    if score.metric == "accuracy":
        scores = [record.get("prediction") == record.get("target") for record in records]
    else:
        scores = [(record.get("scores") or {}).get(score.metric) for record in records]
    if not scores or not all(map(_is_number, scores)):
        return []
    values = [float(value) for value in scores]
    mean = math.fsum(values) / len(values)
    return values if abs(mean - score.value) <= TOLERANCE else []
