"""Comparison of runs: paired differences, settings that differ, and rows of their tests."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.paired_tests import adjust_holm, sign_flip_test
from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.reports.run_table import CONFIG, RunSummary, Score, row_scores, score_interval
from lightning_softprompt.system.dotted_names import flatten
from lightning_softprompt.system.plain_yaml import read_yaml

SEEDS = ("seed_everything", "data.seed")  # settings that differ between repetitions of one experiment
IGNORED = ("run", "ckpt_path", "init_from", "trust", "config")  # settings that do not describe an experiment
Values = Mapping[str, Any]
Scores = Mapping[Any, float]  # the score of each row of a test
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Difference:
    """The difference between the test of a run or experiment and that of the baseline, on the same rows.

    Args:
        name: The run or experiment.
        mean: Mean difference; positive if it scores higher than the baseline.
        interval: Its 95 % bootstrap interval over rows.
        p: Two-sided p-value of the sign-flip test.
        adjusted: The p-value adjusted for the number of comparisons (Holm).
        rows: Number of rows.
    """

    name: str
    mean: float
    interval: tuple[float, float]
    p: float
    adjusted: float
    rows: int


class ComparedRun:
    """A run with the contents of its files, which are read on first use.

    Args:
        folder: The shortest end of its path that no other run of the comparison has.
        summary: The run, which may lack the interval of its test.
    """

    def __init__(self, folder: str, summary: RunSummary) -> None:
        self.folder, self.summary = folder, summary

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of its config as dotted names, without those of its folder."""
        config = {key: value for key, value in read_yaml(self.summary.folder / CONFIG).items() if key not in IGNORED}
        return name_settings(config)

    @cached_property
    def experiment_settings(self) -> dict[str, Any]:
        """The settings without those that differ between repetitions."""
        return {name: value for name, value in self.settings.items() if name not in SEEDS}

    @cached_property
    def records(self) -> dict[Any, Values]:
        """The records of its test by row; empty without a test."""
        folder = self.summary.test_folder
        path = None if folder is None else folder / PREDICTIONS
        if path is None or not path.is_file():
            return {}
        return {_row_key(record): record for record in read_predictions(path)}

    @cached_property
    def scores(self) -> dict[Any, float]:
        """The score of each row whose mean is the metric of the test; empty if the metric is not such a mean."""
        if self.summary.test is None:
            return {}
        values = row_scores(list(self.records.values()), self.summary.test)
        return dict(zip(self.records, values, strict=True)) if values else {}

    @cached_property
    def test(self) -> Score | None:
        """The main metric of the test, with its interval over rows."""
        test = self.summary.test
        return None if test is None else replace(test, interval=score_interval(list(self.scores.values()), test))

    def curve(self, metric: str) -> Curve:
        """Reads the logged values of a metric, by optimizer step, from `metrics.csv`."""
        path = self.summary.folder / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as lines:
            rows = [(row.get("step"), row.get(metric)) for row in csv.DictReader(lines)]
        return [(int(float(step)), float(value)) for step, value in rows if step and value]


def _row_key(record: Values) -> Any:
    """A row is the same in two tests if its index, text and target are."""
    return json.dumps([record.get(name) for name in ("task", "file", "row", "input", "target")])


def name_settings(config: Values) -> dict[str, Any]:
    """Returns the settings of a config by dotted name, without None; a class has the name of its argument.

    >>> name_settings({"model": {"class_path": "a.b.C", "init_args": {"length": 5, "lr": None}}})
    {'model': 'C', 'model.length': 5}
    """
    settings = {}
    for name, value in flatten(config).items():
        if name.endswith(".class_path"):
            settings[name.removesuffix(".class_path")] = str(value).rpartition(".")[2]
        elif value is not None:
            settings[name] = value
    return settings


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Returns the settings that are not equal in all runs, with the value in each run; None where it is not set."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def paired_differences(scores: Mapping[str, Scores], baseline: Scores) -> list[Difference]:
    """Compares the scores of each test with those of the baseline, row by row.

    Args:
        scores: Scores by row of each run or experiment. Those on other rows than the baseline are left out.
        baseline: Scores by row of the baseline.
    """
    differences = {}
    for name, each in scores.items():
        if each and each.keys() == baseline.keys():
            differences[name] = [each[row] - score for row, score in baseline.items()]
    p_values = [sign_flip_test(each) for each in differences.values()]
    compared = []
    for (name, of_rows), p, adjusted in zip(differences.items(), p_values, adjust_holm(p_values), strict=True):
        mean = math.fsum(of_rows) / len(of_rows)
        compared.append(Difference(name, mean, bootstrap(of_rows, draws=2000), p, adjusted, len(of_rows)))
    return compared


def disagreeing_rows(runs: Sequence[ComparedRun], limit: int) -> list[tuple[Values, list[Any]]]:
    """Returns rows whose predictions differ between tested runs, with the prediction of each run.

    Args:
        runs: The runs; a run whose test does not have a row has the prediction None there.
        limit: Maximum number of rows.
    """
    tested = [run for run in runs if run.records]
    if not tested:
        return []
    rows: list[tuple[Values, list[Any]]] = []
    for key, record in tested[0].records.items():
        if len(rows) == limit:
            break
        predictions = [run.records[key].get("prediction") if key in run.records else None for run in runs]
        distinct = {str(prediction) for prediction in predictions if prediction is not None}
        if len(distinct) > 1:
            rows.append((record, predictions))
    return rows


def load_runs(summaries: Sequence[RunSummary]) -> list[ComparedRun]:
    """Returns runs for a comparison, each named by the shortest end of its path that no other run has."""
    paths = [summary.folder.resolve() for summary in summaries]
    runs = []
    for path, summary in zip(paths, summaries, strict=True):
        others = [other for other in paths if other != path]
        length = 1
        while any(other.parts[-length:] == path.parts[-length:] for other in others):
            length += 1
        runs.append(ComparedRun(str(Path(*path.parts[-length:])), summary))
    return runs
