"""The claims of `claims.yaml`, each measured by runs of the experiments.

A claim compares two sides, or follows a series of settings:

    one, other      two selections of runs; the effect is `one` minus `other`, or `one` alone
    series          a selection whose method has a name with a number, such as `prompt tuning, length 20`; the effect is
                    the change when the number doubles
    value           what is compared (default: the test): `gap`, `gradient`, `barrier`, `seconds`, ...; see `VALUES`

A claim with `corpus` compares runs of `pretraining.py` on that corpus; `trained_on` names that of the training. Other
selections name block and method, and task and backbone if the block has several. Other claims have a `result` that was
measured by another command, or a `reason` why they cannot be measured here. `earlier` is a smaller measurement
in `benchmarks/LOG.md`, which is shown until all runs have finished.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from comparisons import Comparison, compare_pairs, compare_rows, fit_slopes
from plan import Cell, Plan

Result = Mapping[str, Any]
Spec = Mapping[str, Any]
LEVEL = 0.05
NUMBER = re.compile(r" (\d[\d.e-]*)$")
TENTH = 10


@dataclass(frozen=True)
class Finding:
    """What the runs show about a claim so far.

    Args:
        runs: Number of finished runs.
        planned: Number of planned runs.
        comparison: The effect; None until all planned runs have finished.
        is_ratio: Whether the effect is a logarithm of a ratio.
    """

    runs: int
    planned: int
    comparison: Comparison | None = None
    is_ratio: bool = False


def measure(claim: Spec, plan: Plan, results: Sequence[Result]) -> Finding:
    """Measures a claim by the finished runs."""
    sides = [claim[name] for name in ("series", "one", "other") if name in claim]
    cells = [select_cells(side, plan) for side in sides]
    value = claim.get("value", "test")
    finished = [find_results(group, results, VALUES[value]) for group in cells]
    planned = len({cell for group in cells for cell in map(identify, group)})
    runs = len({identify_result(result) for group in finished for result in group})
    is_ratio = bool(claim.get("ratio"))
    if runs < planned:
        return Finding(runs, planned, is_ratio=is_ratio)
    if "series" in claim:
        comparison = follow_series(finished[0], VALUES[value])
    elif len(finished) == 1:
        comparison = compare_pairs([VALUES[value](result) for result in finished[0]])
    elif value == "test":
        one, other = (np.array([result["row_scores"] for result in group]) for group in finished)
        comparison = compare_rows(one, other)
    else:
        comparison = compare_values(finished[0], finished[1], VALUES[value], is_ratio)
    return Finding(runs, planned, comparison, is_ratio)


def select_cells(side: Spec, plan: Plan) -> list[Cell]:
    """Returns the planned runs of a selection.

    Raises:
        ValueError: If there is none, or the block has several tasks or backbones and the selection does not name one.
    """
    cells = []
    for cell in plan.cells(side["block"]):
        is_method = cell.recipe == side["recipe"] if "recipe" in side else cell.method == side["method"]
        if is_method and all(
            getattr(cell, name) == side.get(name, getattr(cell, name)) for name in ("task", "backbone")
        ):
            cells.append(cell)
    places = {(cell.task, cell.backbone) for cell in cells}
    if len(places) != 1:
        raise ValueError(f"{dict(side)} selects runs of {len(places)} tasks and backbones, not of 1")
    return cells


def identify(cell: Cell) -> tuple[str, str, str, str, int]:
    """Identifies a planned run."""
    return cell.block, cell.task, cell.backbone, cell.method, cell.seed


def identify_result(result: Result) -> tuple[str, str, str, str, int]:
    """Identifies the planned run of a result."""
    return result["block"], result["task"], result["backbone"], result["method"], result["seed"]


def find_results(cells: Sequence[Cell], results: Sequence[Result], value: Callable[[Result], float]) -> list[Result]:
    """Returns the tested results of planned runs, in their order, if they have the value.

    Of several results of a run, with different settings, the last one counts.
    """
    by_run = {identify_result(result): result for result in results if not result["selects_rate"]}
    candidates = [by_run[identify(cell)] for cell in cells if identify(cell) in by_run]
    return [result for result in candidates if has_value(result, value)]


def has_value(result: Result, value: Callable[[Result], float]) -> bool:
    """Whether a value was measured in a run; runs of earlier versions lack some."""
    try:
        value(result)
    except KeyError:
        return False
    return True


def compare_values(
    one: Sequence[Result], other: Sequence[Result], value: Callable[[Result], float], is_ratio: bool
) -> Comparison:
    """Compares a value of runs by seed; a side without training has one run, which counts for each seed."""
    first, second = ({result["seed"]: value(result) for result in group} for group in (one, other))
    pairs = list(pair_seeds(first, second))
    if is_ratio:
        return compare_pairs([math.log(left / right) for left, right in pairs])
    return compare_pairs([left - right for left, right in pairs])


def pair_seeds(first: Mapping[int, float], second: Mapping[int, float]) -> Iterator[tuple[float, float]]:
    """Yields the values of the same seeds; the value of a side with one run counts for each seed.

    >>> list(pair_seeds({1: 0.5, 2: 0.75}, {1: 0.25}))
    [(0.5, 0.25), (0.75, 0.25)]
    """
    for seed in sorted({*first, *second}):
        pair = []
        for side in (first, second):
            (default,) = side.values() if len(side) == 1 else (None,)
            pair.append(side.get(seed, default))
        left, right = pair
        if left is not None and right is not None:
            yield left, right


def follow_series(results: Sequence[Result], value: Callable[[Result], float]) -> Comparison:
    """Follows a value over the numbers in the names of the methods."""
    table: dict[int, dict[float, float]] = {}
    for result in results:
        table.setdefault(result["seed"], {})[read_number(result["method"])] = value(result)
    positions = sorted(table[min(table)])
    values = np.array([[row[position] for position in positions] for row in table.values()])
    return fit_slopes(positions, values)


def read_number(method: str) -> float:
    """Returns the number at the end of the name of a method.

    >>> read_number("prompt tuning, length 20")
    20.0

    Raises:
        ValueError: If there is none.
    """
    match = NUMBER.search(method)
    if match is None:
        raise ValueError(f"the name {method!r} ends without a number")
    return float(match[1])


def overfitting_gap(result: Result) -> float:
    """Returns how much better the metric is on training rows than on validation rows, at the last validation."""
    gap = training_score(result) - validation_score(result)
    return gap if result["mode"] == "max" else -gap


def training_score(result: Result) -> float:
    """Returns the metric on training rows at the last validation."""
    return last_value(result, "train_sample")


def validation_score(result: Result) -> float:
    """Returns the metric on validation rows at the last validation."""
    return last_value(result, "val")


def last_value(result: Result, stage: str) -> float:
    """Returns the last value of the metric in a stage."""
    points = result["curve"][f"{stage}/{result['metric']}"]
    _, value = points[-1]
    return float(value)


def gradient_decay(result: Result) -> float:
    """Returns the logarithm (base 10) of the mean gradient norm of the last tenth of the steps over the first tenth."""
    norms = [norm for _, norm in result["curve"]["prompt/grad_norm"]]
    count = max(1, len(norms) // TENTH)
    first, last = np.mean(norms[:count]), np.mean(norms[-count:])
    return math.log10(float(last / first))


def loss_barrier(result: Result) -> float:
    """Returns the largest rise of the loss above the straight line between the losses of two runs."""
    points = [(point["t"], point["loss"]) for point in result["line"]]
    first, last = points[0][1], points[-1][1]
    return float(max(loss - (1 - t) * first - t * last for t, loss in points))


def convexity_violation(result: Result) -> float:
    """Returns the least second difference of the loss along the line, which is below 0 if it is not convex."""
    losses = [point["loss"] for point in result["line"]]
    return float(np.diff(losses, 2).min())


VALUES: Mapping[str, Callable[[Result], float]] = {
    "test": lambda result: float(result["test"]),
    "macro_f1": lambda result: float(result["test_metrics"]["test/macro_f1"]),
    "precision": lambda result: float(result["test_metrics"]["test/precision"]),
    "recall": lambda result: float(result["test_metrics"]["test/recall"]),
    "gap": overfitting_gap,
    "training score": training_score,
    "validation score": validation_score,
    "gradient": gradient_decay,
    "barrier": loss_barrier,
    "convexity": convexity_violation,
    "general text": lambda result: float(result["general_text"]["bits_per_byte"]),
    "words": lambda result: float(result["words"]["nearest words"] - result["words"]["prompt"]),
    "seconds": lambda result: float(result["train_seconds"]),
    "memory": lambda result: float(result["train_peak_mb"]),
    "parameters": lambda result: float(result["trainable_parameters"]),
    "use": lambda result: float(result["explanation"]["generated"]["use"]["mean"]),
    "mixed": lambda result: float(result["mixed"]),
    "leak": lambda result: float(result["explanation"]["generated"]["leak"]["mean"]),
}
