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

from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.cli.next_steps import command_line, pipe, suggest
from lightning_softprompt.data.samples.movie_sentences import movie_sentences
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.system.printable import printable


@dataclass(frozen=True)
class TestResult:
    """The results of a test.

    Args:
        metrics: The metrics.
        correct: Whether the prediction of each row is correct.
        seconds: Wall time of the command.
    """

    __test__ = False  # not a class of tests

    metrics: Mapping[str, float]
    correct: Sequence[bool]
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Run the command; further options apply to all its runs, such as `--trainer.max_steps 300`."""
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
        zero_shot = run_test([*common, "--model=NoPrompt"])
        console.rule("2/3 training a soft prompt")
        run, seconds = run_to_end(["fit", *common])
        console.rule("3/3 testing the soft prompt")
        trained = run_test([*common, f"--init_from={run / 'prompt.safetensors'}"])
    except RunError as error:
        return error.code
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    console.print(comparison_table(zero_shot, trained, run, seconds))
    files = f"learning curve: {run / 'plots' / 'learning_curve.png'}\nprompt: {run / 'prompt.safetensors'}"
    console.print(printable(files), markup=False)
    predict = command_line("predict", "--init_from", run / "prompt.safetensors", "--data.predict", "-")
    suggest(pipe("a warm and funny film", predict))
    return 0


def check_options(common: Sequence[str], options: Sequence[str]) -> None:
    """Refuse options that a training does not have, before anything is printed.

    Args:
        common: All options of the training.
        options: The options that the user passed.

    Raises:
        SystemExit: If a training has no such option, or its value is wrong.
        CommandError: If they contradict each other.
    """
    from lightning_softprompt.cli.dry_parse import parse_run
    from lightning_softprompt.distributed.process_arguments import set_process_arguments

    if options:
        with set_process_arguments(["fit", *common]):
            parse_run(["fit", *common])


class RunError(Exception):
    """A command failed and has printed the reason."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def run_to_end(command: Sequence[str]) -> tuple[Path, float]:
    """Run a command, and return its folder and its wall time in seconds."""
    from lightning_softprompt.cli.app import main as run_command
    from lightning_softprompt.runs.run_spec import last_folder

    start = time.perf_counter()
    if code := run_command(command, hints=False):
        raise RunError(code)
    return last_folder(), time.perf_counter() - start


def run_test(options: Sequence[str]) -> TestResult:
    """Run a test, and read its results."""
    folder, seconds = run_to_end(["test", *options])
    metrics = json.loads((folder / "metrics.json").read_text())["test"]
    records = read_predictions(folder / PREDICTIONS)
    correct = [record["prediction"] == record["target"] for record in records]
    return TestResult(metrics, correct, seconds)


def comparison_table(zero_shot: TestResult, trained: TestResult, run: Path, seconds: float) -> Table:
    """Compare the zero-shot backbone and the trained prompt.

    Args:
        zero_shot: The test of the backbone alone.
        trained: The test of the prompt.
        run: Folder of the training.
        seconds: Wall time of the training.
    """
    title = f"{len(zero_shot.correct)} test sentences, the backbone is frozen"
    result = Table("", "zero-shot", "soft prompt", title=title)
    accuracies = with_interval(zero_shot.correct), with_interval(trained.correct)
    result.add_row("accuracy (95 % interval)", *accuracies)
    for name in ("macro_f1", "loss"):
        values = (test.metrics[f"test/{name}"] for test in (zero_shot, trained))
        result.add_row(name, *(f"{value:.3f}" for value in values))
    report = json.loads((run / "metrics.json").read_text())
    trainable, frozen = report["trainable_parameters"], report["frozen_parameters"]
    percent = 100 * trainable / frozen
    prompt, checkpoint = run / "prompt.safetensors", run / "checkpoints" / "last.ckpt"
    result.add_row("trainable parameters", "0", f"{trainable:,} ({percent:.4f} % of the backbone)")
    result.add_row("prompt file", "-", f"{prompt.stat().st_size:,} bytes")
    result.add_row("resumable checkpoint", "-", f"{checkpoint.stat().st_size:,} bytes")
    result.add_row("training", "-", f"{seconds:.0f} s, {tokens_per_second(run):,.0f} tokens/s")
    result.add_row("test", f"{zero_shot.seconds:.0f} s", f"{trained.seconds:.0f} s")
    result.caption = describe_gain(zero_shot.correct, trained.correct)
    return result


def describe_gain(before: Sequence[bool], after: Sequence[bool]) -> str:
    """The difference of two accuracies on the same rows, with its interval."""
    differences = [float(right) - float(left) for left, right in zip(before, after, strict=True)]
    gain = sum(differences) / len(differences)
    low, high = bootstrap(differences)
    return f"accuracy gain {gain:+.3f}, 95 % paired bootstrap interval [{low:+.3f}, {high:+.3f}]"


def with_interval(correct: Sequence[bool]) -> str:
    """An accuracy with its bootstrap interval."""
    low, high = bootstrap([float(value) for value in correct])
    accuracy = sum(correct) / len(correct)
    return f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"


def tokens_per_second(run: Path) -> float:
    """The mean speed over the logging steps of a training."""
    with (run / "metrics.csv").open(newline="") as file:
        values = [row.get("speed/tokens_per_s") for row in csv.DictReader(file)]
    speeds = [float(value) for value in values if value]
    return sum(speeds) / max(1, len(speeds))
