"""Prints the difference in accuracy of each method of `methods.py` from prompt tuning, over the same tasks and seeds.

    python benchmarks/method_differences.py benchmarks/methods.jsonl

The interval is Student's t over all pairs of a task and a seed. Methods without random initial values have one value
for all seeds.
"""

import argparse
import json
from pathlib import Path

from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.reports.text_table import table

BASELINE = "prompt tuning"


def read_accuracies(path: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the accuracies of all seeds by method and task."""
    accuracies: dict[str, dict[str, list[float]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        accuracies.setdefault(record["method"], {})[record["task"]] = record["accuracy"]
    return accuracies


def list_differences(method: dict[str, list[float]], baseline: dict[str, list[float]]) -> list[float]:
    """Returns the differences of a method from the baseline, for each task and seed."""
    differences = []
    for task, expected in baseline.items():
        values = method[task] if len(method[task]) > 1 else method[task] * len(expected)
        differences += [value - base for value, base in zip(values, expected, strict=True)]
    return differences


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the file that `methods.py --out` wrote")
    accuracies = read_accuracies(parser.parse_args().results)
    baseline = accuracies.pop(BASELINE)
    rows = []
    for name, by_task in accuracies.items():
        differences = list_differences(by_task, baseline)
        mean, half_width = student_interval(differences)
        rows.append([name, f"{mean:+.3f} ± {half_width:.3f}", str(len(differences))])
    print(table(rows, ["method", f"accuracy, difference from {BASELINE}", "pairs"]))


if __name__ == "__main__":
    main()
