"""Evaluate the backbone zero-shot, train and test a first soft prompt, and compare both in one table."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_softprompt.cli.app import main as run_command
from lightning_softprompt.cli.app import set_process_arguments
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.cli.dry_parse import parse_run
from lightning_softprompt.cli.next_steps import command_line, pipe, suggest
from lightning_softprompt.data.samples.movie_sentences import movie_sentences
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.printable import printable


@dataclass(frozen=True)
class Tested:
    """What a test run left.

    Args:
        metrics: Of the test.
        right: Whether each row was answered rightly.
        seconds: Wall time of the command.
    """

    metrics: Mapping[str, float]
    right: Sequence[bool]
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Runs it; options it does not know go to its runs, such as `--trainer.max_steps 300`."""
    if "--rag" in argv:
        return int(import_module("lightning_softprompt.cli.rag_quickstart").main(argv))
    parser = argparse.ArgumentParser("softprompt quickstart", description=__doc__)
    parser.add_argument("--folder", default="runs", help="folder of the runs (default: %(default)s)")
    parser.add_argument(
        "--rag", action="store_true", help="retrieval-augmented question answering instead of classification"
    )
    args, options = parser.parse_known_args(list(argv))
    console = Console()
    config = configs_folder() / "run" / "quickstart.yaml"
    try:
        common = ["--config", str(config), f"--data.path={movie_sentences()}", f"--run.folder={args.folder}", *options]
        check_options(common, options)
        console.rule("1/3 zero-shot backbone")
        bare = tested([*common, "--model=NoPrompt"])
        console.rule("2/3 training a soft prompt")
        run, seconds = completed(["fit", *common])
        console.rule("3/3 testing the soft prompt")
        tuned = tested([*common, f"--init_from={run / 'prompt.safetensors'}"])
    except RunError as error:
        return error.code
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    console.print(table(bare, tuned, run, seconds))
    files = f"learning curve: {run / 'plots' / 'learning_curve.png'}\nprompt: {run / 'prompt.safetensors'}"
    console.print(printable(files), markup=False)
    start = command_line("predict", "--ckpt_path", run / "checkpoints" / "best.ckpt", "--data.predict", "-")
    suggest(pipe("a warm and funny film", start))
    return 0


def check_options(common: Sequence[str], options: Sequence[str]) -> None:
    """Refuses options that a training does not have, before anything is printed.

    Args:
        common: All options of the training.
        options: Those that the user gave.

    Raises:
        SystemExit: If a training has no such option, or its value is wrong.
        CommandError: If they contradict each other.
    """
    if options:
        with set_process_arguments(["fit", *common]):
            parse_run(["fit", *common])


class RunError(Exception):
    """A command that failed and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def completed(command: Sequence[str]) -> tuple[Path, float]:
    """Runs a command; gives its folder and the seconds it took."""
    start = time.perf_counter()
    if code := run_command(command, hints=False):
        raise RunError(code)
    return last_folder(), time.perf_counter() - start


def tested(options: Sequence[str]) -> Tested:
    """Runs a test."""
    folder, seconds = completed(["test", *options])
    metrics = json.loads((folder / "metrics.json").read_text())["test"]
    lines = (folder / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return Tested(metrics, [r["prediction"] == r["target"] for r in records], seconds)


def table(bare: Tested, tuned: Tested, run: Path, seconds: float) -> Table:
    """Zero-shot beside trained."""
    result = Table("", "zero-shot", "soft prompt", title=f"{len(bare.right)} test sentences, the backbone is frozen")
    result.add_row("accuracy (95 % interval)", with_interval(bare.right), with_interval(tuned.right))
    for name in ("macro_f1", "loss"):
        result.add_row(name, *(f"{side.metrics[f'test/{name}']:.3f}" for side in (bare, tuned)))
    saved = json.loads((run / "metrics.json").read_text())
    trained, frozen = saved["trainable_parameters"], saved["frozen_parameters"]
    result.add_row("trainable parameters", "0", f"{trained:,} ({100 * trained / frozen:.4f} % of the backbone)")
    result.add_row("prompt file", "-", f"{(run / 'prompt.safetensors').stat().st_size:,} bytes")
    result.add_row("resumable checkpoint", "-", f"{(run / 'checkpoints' / 'last.ckpt').stat().st_size:,} bytes")
    result.add_row("training", "-", f"{seconds:.0f} s, {tokens_per_second(run):,.0f} tokens/s")
    result.add_row("test", f"{bare.seconds:.0f} s", f"{tuned.seconds:.0f} s")
    lift = [float(b) - float(a) for a, b in zip(bare.right, tuned.right, strict=True)]
    low, high = bootstrap(lift)
    result.caption = (
        f"accuracy gain {sum(lift) / len(lift):+.3f}, 95 % paired bootstrap interval [{low:+.3f}, {high:+.3f}]"
    )
    return result


def with_interval(right: Sequence[bool]) -> str:
    """A share with its bootstrap interval."""
    low, high = bootstrap([float(r) for r in right])
    return f"{sum(right) / len(right):.3f} [{low:.3f}, {high:.3f}]"


def tokens_per_second(run: Path) -> float:
    """Mean over the logging steps of a training run."""
    with (run / "metrics.csv").open(newline="") as file:
        speeds = [float(row["speed/tokens_per_s"]) for row in csv.DictReader(file) if row.get("speed/tokens_per_s")]
    return sum(speeds) / max(1, len(speeds))
