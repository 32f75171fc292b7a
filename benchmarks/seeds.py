"""Compares a configured run with several seeds with the backbone without a prompt, and prints a table of test metrics.

    python benchmarks/seeds.py --seeds 1 2 3 -- --config configs/run/quickstart.yaml --data.path PATH

The options after `--` are options of `softprompt fit`. Each seed trains a prompt and tests its best checkpoint. The
backbone without a prompt is tested once. Intervals of means are 95 % Student's t intervals over seeds; intervals in
brackets are over test rows. Summaries have a column for the first sentence of each document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_softprompt.cli.app import main as run_command
from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.runs.run_spec import last_folder

METRICS = ("accuracy", "macro_f1", "loss")
Metrics = dict[str, float]


def main() -> None:
    """Runs all seeds and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--metrics", nargs="+", default=METRICS)
    parser.add_argument(
        "--bare", action=argparse.BooleanOptionalAction, default=True, help="test the backbone without a prompt, too"
    )
    args, options = parser.parse_known_args()
    options = [option for option in options if option != "--"]
    no_prompt = evaluate(["--seed_everything=1", *remove_method(options), "--model=NoPrompt"]) if args.bare else {}
    runs = [train_and_evaluate(seed, options) for seed in args.seeds]
    lead = ["lead"] if any(name.startswith("test/lead/") for name in no_prompt) else []
    heads = ["metric", "no prompt", *lead, *(f"seed {seed}" for seed in args.seeds), "mean (95 % interval)"]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for metric in args.metrics:
        first = [format_metric(no_prompt, metric)]
        if lead:
            first.append(format_metric(no_prompt, f"lead/{metric}"))
        mean = interval([run[f"test/{metric}"] for run in runs])
        values = [format_metric(run, metric) for run in runs]
        print(f"| {' | '.join([metric, *first, *values, mean])} |")


def format_metric(metrics: Metrics, name: str) -> str:
    """Returns a metric as text, with its interval over rows if there is one."""
    if f"test/{name}" not in metrics:
        return ""
    value = f"{metrics[f'test/{name}']:.3f}"
    low, high = (metrics.get(f"test/{name}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return value
    return f"{value} [{low:.3f}, {high:.3f}]"


def train_and_evaluate(seed: int, options: Sequence[str]) -> Metrics:
    """Trains a prompt with a seed and returns the test metrics of its best checkpoint."""
    seeded = [*options, f"--seed_everything={seed}", f"--data.seed={seed}"]
    run(["fit", *seeded])
    return evaluate([*seeded, f"--init_from={last_folder() / 'prompt.safetensors'}"])


def evaluate(options: Sequence[str]) -> Metrics:
    """Returns test metrics."""
    run(["test", *options])
    return json.loads((last_folder() / "metrics.json").read_text())["test"]


def run(command: Sequence[str]) -> Path:
    """Runs a command and returns its folder.

    Raises:
        SystemExit: If it fails.
    """
    if code := run_command(command):
        sys.exit(code)
    return last_folder()


def remove_method(options: Sequence[str]) -> list[str]:
    """Removes the options of the method, which a backbone without a prompt does not have."""
    remaining, skip = [], False
    for option in options:
        if skip:
            skip = False
        elif option == "--model" or (option.startswith("--model.") and "=" not in option):
            skip = True  # its value
        elif not option.startswith(("--model.", "--model=")):
            remaining.append(option)
    return remaining


def interval(values: Sequence[float]) -> str:
    """Returns the mean and the half-width of its interval over seeds as text."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean, half = student_interval(values)
    return f"{mean:.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
