"""A configured run with several seeds beside the bare backbone: mean and interval of its test metrics, as a table.

    python benchmarks/seeds.py --seeds 1 2 3 -- --config configs/run/quickstart.yaml --data.path PATH

What stands behind `--` is what `softprompt fit` would be given. Every seed trains, then tests its best prompt; the bare
backbone is tested once. Intervals of means are Student's t over seeds, at 95 %; those in brackets are over test rows,
where the run has them. Summaries have a column of the documents' first sentences.
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
    """Runs all and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--metrics", nargs="+", default=METRICS)
    parser.add_argument("--bare", action=argparse.BooleanOptionalAction, default=True, help="whether it is tested too")
    args, options = parser.parse_known_args()
    options = [option for option in options if option != "--"]
    bare = tested(["--seed_everything=1", *without_method(options), "--model=NoPrompt"]) if args.bare else {}
    runs = [trained_and_tested(seed, options) for seed in args.seeds]
    lead = ["lead"] if any(name.startswith("test/lead/") for name in bare) else []
    print(
        f"| {' | '.join(['metric', 'bare', *lead, *(f'seed {seed}' for seed in args.seeds)])} | mean (95 % interval) |"
    )
    print("|---" * (3 + len(lead) + len(runs)) + "|")
    for metric in args.metrics:
        first = [shown(bare, metric), *(shown(bare, f"lead/{metric}") for _ in lead)]
        mean = interval([run[f"test/{metric}"] for run in runs])
        print(f"| {' | '.join([metric, *first, *(shown(run, metric) for run in runs), mean])} |")


def shown(metrics: Metrics, name: str) -> str:
    """A metric, with its interval over rows where there is one."""
    if f"test/{name}" not in metrics:
        return ""
    ends = [metrics.get(f"test/{name}_{end}") for end in ("low", "high")]
    said = "" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
    return f"{metrics[f'test/{name}']:.3f}{said}"


def trained_and_tested(seed: int, options: Sequence[str]) -> Metrics:
    """Test metrics of the best prompt of one seed."""
    seeded = [*options, f"--seed_everything={seed}", f"--data.seed={seed}"]
    run(["fit", *seeded])
    return tested([*seeded, f"--init_from={last_folder() / 'prompt.safetensors'}"])


def tested(options: Sequence[str]) -> Metrics:
    """Test metrics."""
    run(["test", *options])
    return json.loads((last_folder() / "metrics.json").read_text())["test"]


def run(command: Sequence[str]) -> Path:
    """Runs a command, or stops."""
    if code := run_command(command):
        sys.exit(code)
    return last_folder()


def without_method(options: Sequence[str]) -> list[str]:
    """The options but those of the method, which the bare backbone does not take."""
    kept, skip = [], False
    for option in options:
        if skip:
            skip = False
        elif option == "--model" or (option.startswith("--model.") and "=" not in option):
            skip = True  # its value
        elif not option.startswith(("--model.", "--model=")):
            kept.append(option)
    return kept


def interval(values: Sequence[float]) -> str:
    """Mean and half width over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean, half = student_interval(values)
    return f"{mean:.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
