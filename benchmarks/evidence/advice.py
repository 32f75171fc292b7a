"""Summarizes `results.jsonl` for `softprompt methods --advise`. Called by `tables.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from comparisons import welch_test

from lightning_softprompt.evaluation.metrics.intervals import bootstrap, student_interval
from lightning_softprompt.evaluation.metrics.paired_tests import adjust_holm, sign_flip_test
from lightning_softprompt.system.plain_yaml import read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
ADVICE = REPOSITORY / "lightning_softprompt" / "methods" / "advice.json"
LEVEL = 0.05  # of differences
DIGITS = 5
LOSSES = ("loss", "perplexity")  # metrics whose least value is best
Result = Mapping[str, Any]
Methods = Mapping[str, Sequence[Result]]  # results of each seed, by name of the method


def write_advice(results: Sequence[Result], path: Path = ADVICE) -> None:
    """Writes the summary to the file that the package contains."""
    path.write_text(json.dumps(summarize(results), indent=1) + "\n", encoding="utf-8")


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns the comparisons of at least two methods on a task with a backbone and a number of rows."""
    tested = last_of_each_run(results)
    groups: dict[tuple[str, str, int], dict[str, list[Result]]] = {}
    for result in filter(is_trained, tested):
        group = groups.setdefault((result["task"], result["backbone"], rows_of(result)), {})
        name = result["method"].partition(", shots")[0]
        group.setdefault(f"{result['block']}/{name}", []).append(result)
    comparisons = []
    for (task, backbone, rows), by_block in groups.items():
        methods = first_block_of_each(by_block)
        for result in tested:
            if (result["task"], result["backbone"]) == (task, backbone) and not is_trained(result):
                methods.setdefault(result["method"], [result])
        if len({members[0]["options"]["model"] for members in methods.values()}) > 1:
            comparisons.append(compare(task, backbone, rows, methods))
    return comparisons


def last_of_each_run(results: Sequence[Result]) -> list[Result]:
    """Returns the tested results. Of several settings of the same run, the last one counts."""
    names = ("block", "task", "backbone", "method", "seed")
    by_run = {tuple(result[name] for name in names): result for result in results if "test" in result}
    return list(by_run.values())


def is_trained(result: Result) -> bool:
    """Returns whether the result has a training."""
    return "trainable_parameters" in result


def first_block_of_each(by_block: Mapping[str, Sequence[Result]]) -> dict[str, Sequence[Result]]:
    """Returns the results of each method from the first block that tests it, without methods whose options vary."""
    names = [key.partition("/")[2] for key in by_block]
    methods: dict[str, Sequence[Result]] = {}
    for name, members in zip(names, by_block.values(), strict=True):
        if "," not in name:  # a name such as `prompt tuning, length 5` belongs to a comparison of lengths
            methods.setdefault(name, members)
    return methods


def rows_of(result: Result) -> int:
    """Returns the largest number of rows that the training can read: steps x batch size, or the sampled rows."""
    options = result["options"]
    read = int(result["steps"] * options["data.batch_size"])
    if "data.shots" not in options:
        return read
    config = read_yaml(REPOSITORY / options["data"])
    return min(read, int(options["data.shots"]) * len(config["init_args"]["labels"]))


def compare(task: str, backbone: str, rows: int, methods: Methods) -> dict[str, Any]:
    """Returns a comparison of methods, the best one first, with the pairs that are not shown to differ."""
    first = next(iter(methods.values()))[0]
    metric = first.get("test_metric") or first["metric"]
    mode = "min" if metric in LOSSES else "max"
    varied = find_varied_options([members[0]["options"] for members in methods.values()])
    entries = [describe(name, members, varied) for name, members in methods.items()]
    entries.sort(key=lambda entry: float(entry["mean"]), reverse=mode == "max")
    return {
        "task": task,
        "kind": first["path"].partition("/")[0],
        "backbone": backbone,
        "rows": rows,
        "steps": max(members[0]["steps"] for members in methods.values()),
        "metric": metric,
        "mode": mode,
        "methods": entries,
        "undecided": find_undecided_pairs(methods),
    }


def find_varied_options(options: Sequence[Mapping[str, Any]]) -> set[str]:
    """Returns the options of data that differ between methods, except the number of rows and the seed."""
    names = {name for each in options for name in each if name.startswith("data.")}
    varied = {name for name in names if len({json.dumps(each.get(name)) for each in options}) > 1}
    return varied - {"data.shots", "data.seed"}


def describe(name: str, members: Sequence[Result], varied: Iterable[str]) -> dict[str, Any]:
    """Returns scores, options and costs of a method."""
    first, tests = members[0], [result["test"] for result in members]
    mean, half_width = student_interval(tests)
    interval = [mean - half_width, mean + half_width]
    if len(members) == 1:
        scores = first["row_scores"]
        interval = list(bootstrap(scores, draws=2000)) if scores else []
    options = {key: value for key, value in first["options"].items() if key.startswith("model") or key in varied}
    return {
        "method": name,
        "options": options,
        "mean": round(mean, DIGITS),
        "interval": [round(bound, DIGITS) for bound in interval],
        "seeds": len(members),
        "parameters": first.get("trainable_parameters", 0),
        "seconds_per_step": dict(seconds_per_step(members)),
    }


def seconds_per_step(members: Sequence[Result]) -> Iterator[tuple[str, float]]:
    """Yields the median time of a step of training, with its share of the validations, of each kind of device."""
    for device in sorted({result["device"] for result in members}):
        trained = [result for result in members if result["device"] == device and is_trained(result)]
        if trained:
            seconds = np.median([result["train_seconds"] / result["steps"] for result in trained])
            yield device, round(float(seconds), DIGITS)


def find_undecided_pairs(methods: Methods) -> list[list[str]]:
    """Returns the pairs without a significant difference (Holm), or without a score for each test row."""
    scores = {name: read_scores(members) for name, members in methods.items()}
    paired: list[list[str]] = []
    undecided: list[list[str]] = []
    for one, other in combinations(methods, 2):
        is_paired = scores[one].shape[1] == scores[other].shape[1] > 0
        (paired if is_paired else undecided).append([one, other])
    p_values = [test_difference(scores[one], scores[other]) for one, other in paired]
    for pair, p in zip(paired, adjust_holm(p_values), strict=True):
        if p >= LEVEL:
            undecided.append(pair)
    return undecided


def read_scores(members: Sequence[Result]) -> np.ndarray:
    """Returns the score of each test row [seeds, rows]; without rows if a seed has no scores or other rows."""
    scores = [result["row_scores"] for result in members]
    is_complete = len(set(map(len, scores))) == 1
    return np.array(scores if is_complete else [[]] * len(scores))


def test_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the p-value of equal scores [seeds, rows]: the larger one for other test rows and for other seeds.

    Rows are tested with random signs of their differences, seeds with the test of Welch (1947).
    """
    over_rows = sign_flip_test((one.mean(axis=0) - other.mean(axis=0)).tolist())
    return max(over_rows, welch_test(one.mean(axis=1), other.mean(axis=1)))
