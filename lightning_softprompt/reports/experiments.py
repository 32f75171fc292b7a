"""Experiments of a comparison: runs that differ only in their seeds, with names for people."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.reports.comparison import SEEDS, ComparedRun, Scores

MAX_SETTINGS = 4  # in the name of an experiment
MAX_VALUE = 30  # characters of a value in the name of an experiment
LOWER_IS_BETTER = ("loss", "cross_entropy", "perplexity")


@dataclass(frozen=True)
class Experiment:
    """Runs that differ only in their seeds.

    Args:
        name: Method, and the settings that distinguish it from other experiments with the same method and data.
        runs: The runs.
    """

    name: str
    runs: tuple[ComparedRun, ...]

    @cached_property
    def metric(self) -> str:
        """The metric of the tests; empty without tests, or if the tests have several metrics."""
        metrics = {run.summary.test.metric for run in self.runs if run.summary.test is not None}
        return metrics.pop() if len(metrics) == 1 else ""

    @cached_property
    def tests(self) -> list[float]:
        """The tests of its runs, if all have the same metric."""
        return [run.summary.test.value for run in self.runs if self.metric and run.summary.test is not None]

    @cached_property
    def mean(self) -> float:
        """Mean of the tests; NaN without tests."""
        return _mean(self.tests) if self.tests else math.nan

    @cached_property
    def half_width(self) -> float:
        """Half-width of the 95 % interval over the repetitions (Student's t); infinite for one run."""
        return student_interval(self.tests)[1]

    @cached_property
    def scores(self) -> Scores:
        """Mean score of each row over the runs; empty if the tests are not on the same rows."""
        scores = [run.scores for run in self.runs if run.scores]
        if not self.metric or len(scores) < len(self.tests):
            return {}
        rows = scores[0].keys()
        if any(each.keys() != rows for each in scores):
            return {}
        return {row: _mean([each[row] for each in scores]) for row in rows}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class Comparison:
    """Runs with names for people, grouped into experiments.

    Args:
        runs: The runs.

    Attributes:
        experiments: The experiments, grouped by metric, the best mean first; those without tests come last.
        names: Name of each run by its folder: its experiment and seed, or else its experiment and folder.
    """

    def __init__(self, runs: Sequence[ComparedRun]) -> None:
        self.experiments = sorted(_group_repetitions(runs), key=_rank)
        self.runs = [run for experiment in self.experiments for run in experiment.runs]
        self.names: dict[str, str] = {}
        for experiment in self.experiments:
            self.names |= _name_repetitions(experiment)

    def name(self, run: ComparedRun) -> str:
        """Returns the name of a run."""
        return self.names[run.folder]

    def experiment_of(self, run: ComparedRun) -> Experiment:
        """Returns the experiment of a run."""
        return next(experiment for experiment in self.experiments if run in experiment.runs)


def _rank(experiment: Experiment) -> tuple[bool, str, float, str]:
    sign = 1 if experiment.metric in LOWER_IS_BETTER else -1
    return not experiment.tests, experiment.metric, sign * experiment.mean, experiment.name


def _group_repetitions(runs: Sequence[ComparedRun]) -> list[Experiment]:
    groups: dict[tuple[str, ...], list[ComparedRun]] = {}
    for run in runs:
        settings = json.dumps(run.experiment_settings, sort_keys=True, default=str)
        groups.setdefault((run.summary.method, run.summary.data, settings), []).append(run)
    names = _name_experiments([group[0] for group in groups.values()])
    return [Experiment(name, tuple(group)) for name, group in zip(names, groups.values(), strict=True)]


def _name_experiments(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Yields the name of the experiment of each run; the runs are of different experiments."""
    names_data = len({run.summary.data for run in runs}) > 1
    similar_runs: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in runs:
        similar_runs.setdefault((run.summary.method, run.summary.data), []).append(run)
    numbers: Counter[str] = Counter()
    for run in runs:
        name = run.summary.method or "run"
        if names_data:
            name += f" on {run.summary.data}"
        similar = [other.experiment_settings for other in similar_runs[run.summary.method, run.summary.data]]
        name = ", ".join([name, *_distinguishing_settings(run.experiment_settings, similar)])
        numbers[name] += 1
        yield name if numbers[name] == 1 else f"{name} ({numbers[name]})"


def _distinguishing_settings(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the settings that are not equal in all experiments as text, those of the method first."""
    first = others[0]
    names = dict.fromkeys(chain(*others))
    differing = [name for name in names if any(other.get(name) != first.get(name) for other in others)]
    differing.sort(key=lambda name: not name.startswith("model"))
    texts = []
    for name in differing[:MAX_SETTINGS]:
        value = settings.get(name)
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        texts.append(f"{name.removeprefix('model.')}={text[:MAX_VALUE]}")
    return texts


def _name_repetitions(experiment: Experiment) -> dict[str, str]:
    """Returns the name of each run of an experiment by its folder."""
    if len(experiment.runs) == 1:
        return {experiment.runs[0].folder: experiment.name}
    seeds = [[run.settings.get(name) for name in SEEDS] for run in experiment.runs]
    first = [str(seed) for seed, _ in seeds]
    both = [f"{seed}, data seed {data_seed}" for seed, data_seed in seeds]
    for numbers in (first, both):
        if len(set(numbers)) == len(numbers):
            pairs = zip(experiment.runs, numbers, strict=True)
            return {run.folder: f"{experiment.name}, seed {number}" for run, number in pairs}
    return {run.folder: f"{experiment.name}, {run.folder}" for run in experiment.runs}
