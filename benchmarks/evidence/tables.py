"""Draws the tables of the evidence page from `results.jsonl`.

    python benchmarks/evidence/tables.py > docs/evidence.md

Each block has a table of its methods with the mean over seeds, and a table of all pairs of methods, compared row by row
on the test set with p-values adjusted for the number of pairs (Holm).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lightning_softprompt.evaluation.metrics.intervals import bootstrap, student_interval
from lightning_softprompt.evaluation.metrics.paired_tests import adjust_holm, sign_flip_test

LEVEL = 0.05
HEADER = """\
# Evidence

Measured by `python benchmarks/evidence/run_queue.py`. `python benchmarks/evidence/tables.py` draws the tables from
`benchmarks/evidence/results.jsonl`, which has every run with its settings, scores of rows, code version and machine.

Each method trains {steps} steps. Its learning rate is the one with the best validation among its candidates, each
trained {rate_steps} steps with another seed. ± is the half-width of the 95 % interval of the mean over seeds
(Student's t).
"""
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """The tested runs of a method on a task and a backbone.

    Args:
        method: Name of the method.
        results: One result per seed.
    """

    method: str
    results: Sequence[Result]

    @property
    def tests(self) -> list[float]:
        """The test metric of each seed."""
        return [result["test"] for result in self.results]

    @property
    def row_scores(self) -> np.ndarray:
        """Mean score of each test row over seeds; empty if the metric is not a mean over rows."""
        return np.mean([result["row_scores"] for result in self.results], axis=0)


def main() -> None:
    """Prints the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"), metavar="JSONL")
    args = parser.parse_args()
    results = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    print("\n".join(page(results)))


def page(results: Sequence[Result]) -> Iterator[str]:
    """Yields the lines of the page."""
    search_steps, final_steps = [0], [0]
    for result in results:
        if result["rate"] is not None:
            steps = search_steps if result["selects_rate"] else final_steps
            steps.append(result["steps"])
    yield HEADER.format(steps=max(final_steps), rate_steps=max(search_steps))
    tested = [result for result in results if "test" in result]
    groups: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for result in tested:
        group = groups.setdefault((result["block"], result["task"], result["backbone"]), {})
        group.setdefault(result["method"], []).append(result)
    for (block, task, backbone), results_by_method in groups.items():
        cells = [Cell(method, members) for method, members in results_by_method.items()]
        yield f"## {block}: {task}, {backbone}\n"
        yield from methods_table(cells)
        yield from pairs_table(cells)


def methods_table(cells: Sequence[Cell]) -> Iterator[str]:
    """Yields a line per method, the best one first."""
    first = cells[0].results[0]
    order = sorted(cells, key=lambda cell: float(np.mean(cell.tests)), reverse=first["mode"] == "max")
    yield f"| method | seeds | test {first['metric']} | learning rate | parameters | minutes | peak MB |"
    yield "|---|---|---|---|---|---|---|"
    for cell in order:
        first = cell.results[0]
        mean, half_width = student_interval(cell.tests)
        spread = f" ± {half_width:.3f}" if len(cell.tests) > 1 else ""
        minutes = np.mean([result.get("train_seconds", 0.0) for result in cell.results]) / 60
        peak = max(result["peak_mb"] for result in cell.results)
        columns = [cell.method, str(len(cell.tests)), f"{mean:.3f}{spread}"]
        columns += [
            str(first["rate"] or "-"),
            f"{first.get('trainable_parameters', 0):,}",
            f"{minutes:.1f}",
            f"{peak:,}",
        ]
        yield f"| {' | '.join(columns)} |"
    yield ""


def pairs_table(cells: Sequence[Cell]) -> Iterator[str]:
    """Yields a line per pair of methods that differ after the correction, and a list of the other pairs."""
    pairs = []
    for one, other in combinations(cells, 2):
        if one.row_scores.size == other.row_scores.size > 0:
            pairs.append((one, other))
    if not pairs:
        return
    differences = [one.row_scores - other.row_scores for one, other in pairs]
    adjusted = adjust_holm([sign_flip_test(difference.tolist()) for difference in differences])
    yield f"Pairs that differ on the test rows (adjusted p < {LEVEL}, {len(pairs)} pairs):\n"
    yield "| pair | difference | 95 % interval | adjusted p |"
    yield "|---|---|---|---|"
    equal = []
    for (one, other), difference, p in zip(pairs, differences, adjusted, strict=True):
        better, worse, sign = (one, other, 1) if difference.mean() >= 0 else (other, one, -1)
        if p >= LEVEL:
            equal.append(f"{better.method} and {worse.method}")
            continue
        gains = sign * difference
        low, high = bootstrap(gains.tolist(), draws=2000)
        names = f"{better.method} over {worse.method}"
        interval = f"[{low:.3f}, {high:.3f}]"
        yield f"| {names} | {gains.mean():.3f} | {interval} | {p:.4f} |"
    if equal:
        yield f"\nNo difference is shown between {'; '.join(equal)}."
    yield ""


if __name__ == "__main__":
    main()
