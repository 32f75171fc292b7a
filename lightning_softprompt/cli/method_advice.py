"""Advice on methods, from measured comparisons and from the table of the guide. This module imports no torch."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any

from lightning_softprompt.reports.text_table import table, terminal_width
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.plain_yaml import read_yaml

FOLDER = Path(__file__).parents[1] / "methods"
MEASURED_FILE = FOLDER / "advice.json"
CHOICES_FILE = FOLDER / "choices.yaml"
BYTES = 4  # per parameter in a prompt file
FAR = 4  # a measured number of rows that differs by a larger factor is announced
HEADER = ["method", "test", "compared with the best", "parameters", "file", "seconds per step"]


@dataclass(frozen=True)
class MeasuredMethod:
    """A method in a comparison.

    Args:
        method: Its name.
        options: Options of `softprompt fit`.
        mean: Test metric, the mean over seeds.
        interval: 95 % interval over seeds, or over test rows for a single seed; empty if unknown.
        seeds: Number of seeds.
        parameters: Trainable parameters.
        seconds_per_step: Time of a training step with its share of validations, by kind of device.
    """

    method: str
    options: Mapping[str, Any]
    mean: float
    interval: Sequence[float]
    seeds: int
    parameters: int
    seconds_per_step: Mapping[str, float]

    def fits(self, max_parameters: float, max_seconds: float) -> bool:
        """Whether the method is within a budget, on the fastest measured device."""
        seconds = min(self.seconds_per_step.values(), default=0.0)
        return self.parameters <= max_parameters and seconds <= max_seconds


@dataclass(frozen=True)
class Comparison:
    """Measured methods on a task with a backbone and a number of training rows.

    Args:
        task: Name of the data set.
        kind: Kind of the task, such as `classification`.
        backbone: Name of the backbone.
        rows: Number of training rows.
        steps: Optimizer steps.
        metric: Test metric.
        mode: Whether its least (`min`) or greatest value (`max`) is best.
        methods: The methods, the best one first.
        undecided: Pairs of methods that are not shown to differ.
    """

    task: str
    kind: str
    backbone: str
    rows: int
    steps: int
    metric: str
    mode: str
    methods: Sequence[MeasuredMethod]
    undecided: Sequence[Sequence[str]]

    def is_undecided(self, one: MeasuredMethod, other: MeasuredMethod) -> bool:
        """Whether two methods are the same, or not shown to differ."""
        names = {one.method, other.method}
        return len(names) == 1 or names in map(set, self.undecided)


@dataclass(frozen=True)
class Choice:
    """A row of the table in the guide.

    Args:
        situation: Task, data and constraints.
        tasks: Kinds of tasks; empty for all.
        rows: Least and greatest number of training rows, None without limit.
        choose: The methods.
        measured: Results on which the choice is based.
    """

    situation: str
    tasks: Sequence[str]
    rows: Sequence[int | None]
    choose: str
    measured: str

    def applies(self, rows: int | None) -> bool:
        """Whether the choice is for this number of rows."""
        least, greatest = self.rows
        return rows is None or (least or 0) <= rows <= (inf if greatest is None else greatest)

    def format(self) -> str:
        """Return the choice as text for a terminal, without the marks of Markdown."""
        texts = [self.situation, f"choose: {self.choose}", f"measured: {self.measured}"]
        lines = []
        for number, text in enumerate(texts):
            indent = "  " if number else ""
            width = terminal_width()
            lines += textwrap.wrap(text.replace("`", ""), width, initial_indent=indent, subsequent_indent=2 * indent)
        return "\n".join(lines)


@dataclass(frozen=True)
class Question:
    """What advice is requested for.

    Args:
        task: Kind of task, or name of a measured data set; None for all.
        rows: Number of training rows.
        max_parameters: Largest number of trainable parameters.
        max_seconds: Longest time of a training step.
    """

    task: str | None = None
    rows: int | None = None
    max_parameters: float = inf
    max_seconds: float = inf

    @property
    def has_budget(self) -> bool:
        """Whether a limit is set."""
        return min(self.max_parameters, self.max_seconds) < inf


def read_comparisons(path: Path = MEASURED_FILE) -> list[Comparison]:
    """Read the measured comparisons."""
    comparisons = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        methods = [MeasuredMethod(**method) for method in entry["methods"]]
        comparisons.append(Comparison(**{**entry, "methods": methods}))
    return comparisons


def read_choices(path: Path = CHOICES_FILE) -> list[Choice]:
    """Read the table of the guide."""
    return [Choice(**entry) for entry in read_yaml(path)]


def advise(question: Question, comparisons: Sequence[Comparison], choices: Sequence[Choice]) -> Iterator[str]:
    """Yield the paragraphs of the advice.

    Raises:
        CommandError: If the task is unknown.
    """
    kinds = select_kinds(question.task, comparisons, choices)
    chosen = [each for each in comparisons if question.task in (None, each.kind, each.task)]
    for comparison in nearest_in_rows(chosen, question.rows):
        yield from describe(comparison, question)
    unmeasured = [kind for kind in kinds if kind not in {comparison.kind for comparison in chosen}]
    if unmeasured:
        yield f"Not measured yet by the evidence queue: {', '.join(unmeasured)}. The guide recommends:"
        if question.has_budget:
            yield "These recommendations do not take --max-parameters and --max-seconds into account."
    else:
        yield "The guide recommends for all tasks:"
    for choice in choices:
        is_relevant = not choice.tasks or set(choice.tasks) & set(unmeasured)
        if is_relevant and choice.applies(question.rows):
            yield choice.format()
    yield "The letters refer to the measurements in docs/guide/methods.md, on SmolLM2-135M-Instruct."


def select_kinds(task: str | None, comparisons: Sequence[Comparison], choices: Sequence[Choice]) -> list[str]:
    """Return the kinds of tasks of a question.

    Raises:
        CommandError: If the task is unknown.
    """
    kinds = dict.fromkeys(kind for choice in choices for kind in choice.tasks)
    kinds |= dict.fromkeys(comparison.kind for comparison in comparisons)
    kind_by_task = {comparison.task: comparison.kind for comparison in comparisons}
    if task is None:
        return list(kinds)
    if task in kinds:
        return [task]
    if task in kind_by_task:
        return [kind_by_task[task]]
    known = [*kinds, *kind_by_task]
    close = get_close_matches(task, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"
    raise CommandError(f"unknown task {task!r}; {hint}")


def nearest_in_rows(comparisons: Sequence[Comparison], rows: int | None) -> list[Comparison]:
    """Return for each task and backbone the comparison with the nearest number of rows; all without a number."""
    if rows is None:
        return list(comparisons)
    nearest: dict[tuple[str, str], Comparison] = {}
    for comparison in sorted(comparisons, key=lambda each: factor(each.rows, rows)):
        nearest.setdefault((comparison.task, comparison.backbone), comparison)
    return list(nearest.values())


def factor(one: int, other: int) -> float:
    """Return the factor of at least 1 between two numbers.

    >>> factor(10, 40), factor(40, 10)
    (4.0, 4.0)
    """
    return max(one / other, other / one)


def describe(comparison: Comparison, question: Question) -> Iterator[str]:
    """Yield a comparison as a table, and the method to choose from it."""
    better = "higher is better" if comparison.mode == "max" else "lower is better"
    setting = f"{comparison.task} with {comparison.backbone}, up to {comparison.rows:,} training rows"
    yield f"{comparison.kind}: {setting}, {comparison.steps} steps; {comparison.metric}, {better}"
    if question.rows is not None and factor(comparison.rows, question.rows) > FAR:
        yield f"No comparison has about {question.rows:,} rows; this is the nearest one."
    methods = [each for each in comparison.methods if each.fits(question.max_parameters, question.max_seconds)]
    if not methods:
        yield "No measured method is within the budget."
        return
    best = methods[0]
    equal = [each for each in methods if comparison.is_undecided(best, each)]
    rows = [[*cells(each), *costs(each)] for each in methods]
    for row, method in zip(rows, methods, strict=True):
        status = "no difference shown" if method in equal else "worse (adjusted p < 0.05)"
        row.insert(2, "best" if method is best else status)
    yield table(rows, HEADER)
    smallest = min(equal, key=lambda each: each.parameters)
    reason = "the best one" if smallest is best else f"not shown to differ from {best.method}, with fewer parameters"
    if len(equal) > 1 and smallest is best:
        reason = "the best one, and the one with the fewest parameters of those that are not shown to differ from it"
    yield f"Choose {smallest.method}: {reason}.\n  softprompt fit {to_arguments(smallest.options)} ..."


def cells(method: MeasuredMethod) -> list[str]:
    """Return the name and the test metric of a method."""
    score = f"{method.mean:.3f}"
    if method.interval:
        low, high = method.interval
        score = f"{score} [{low:.3f}, {high:.3f}]"
    seeds = f"{method.seeds} seed{'s' * (method.seeds > 1)}"
    return [method.method, f"{score} ({seeds})"]


def costs(method: MeasuredMethod) -> list[str]:
    """Return the parameters, the size of the file and the time of a step."""
    seconds = [f"{value:.2f} {device}" for device, value in method.seconds_per_step.items()]
    return [f"{method.parameters:,}", size(BYTES * method.parameters), ", ".join(seconds) or "-"]


def size(count: float) -> str:
    """Return a number of bytes with a unit.

    >>> size(0), size(46_080), size(538_000_000)
    ('-', '46 kB', '538 MB')
    """
    if not count:
        return "-"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def to_arguments(options: Mapping[str, Any]) -> str:
    """Return options as words of a command line.

    >>> to_arguments({"model": "PTuning", "model.blocks": [20]})
    "--model PTuning --model.blocks '[20]'"
    """
    words = []
    for name, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words.append(f"--{name} {shlex.quote(text)}")
    return " ".join(words)
