"""Build an index, answer questions with the backbone and with a trained soft prompt, and compare both in one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.cli.commands.index import main as index_command
from lightning_softprompt.cli.commands.quickstart import RunError, check_options, run_to_end
from lightning_softprompt.data.samples.notes import notes
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.system.printable import printable

MEASURES = ("exact_match", "f1", "precision", "recall")


@dataclass(frozen=True)
class TestResults:
    """Results of a test of questions.

    Args:
        metrics: Metrics of the test.
        scores: F1 of each row.
        first: The first question and its answer.
        seconds: Wall time of the command.
    """

    metrics: Mapping[str, float]
    scores: Sequence[float]
    first: tuple[str, str]
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Runs the quickstart; unknown options are passed to its runs, such as `--trainer.max_steps 300`."""
    parser = argparse.ArgumentParser("softprompt quickstart --rag", description=__doc__)
    parser.add_argument("--rag", action="store_true", required=True, help="the retrieval-augmented quickstart")
    parser.add_argument("--folder", default="runs", help="folder of runs and index (default: %(default)s)")
    args, options = parser.parse_known_args(list(argv))
    try:
        run_all(Console(), Path(args.folder), options)
    except RunError as error:
        return error.code
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def run_all(console: Console, folder: Path, options: Sequence[str]) -> None:
    """Runs each step under a title line."""
    config, data, index = configs_folder() / "run" / "rag_quickstart.yaml", notes(), folder / "rag-quickstart-index"
    common = ["--config", str(config), f"--data.path={data}", f"--data.corpus={data}",
              f"--data.retriever.index={index}", f"--run.folder={folder}", *options]  # fmt: skip
    check_options(common, options)
    console.rule("1/5 an index of the notes")
    if code := index_command(["build", str(data), "--index", str(index)]):
        raise RunError(code)
    console.rule("2/5 the bare backbone without passages")
    closed = run_test([*common, "--model=NoPrompt", "--data.passages.mode=closed_book"])
    console.rule("3/5 the bare backbone with passages")
    bare = run_test([*common, "--model=NoPrompt"])
    console.rule("4/5 training a soft prompt")
    run, seconds = run_to_end(["fit", *common])
    console.rule("5/5 testing them")
    tuned = run_test([*common, f"--init_from={run / 'prompt.safetensors'}"])
    console.print(table(closed, bare, tuned, run, seconds))
    question, answer = tuned.first
    console.print(printable(f"{question}\n  bare: {bare.first[1]}\n  soft prompt: {answer}"), markup=False)
    files = f"index: {index}\nlearning curve: {run / 'plots' / 'learning_curve.png'}"
    console.print(printable(files), markup=False)


def run_test(options: Sequence[str]) -> TestResults:
    """Runs a test."""
    folder, seconds = run_to_end(["test", *options])
    metrics = json.loads((folder / "metrics.json").read_text())["test"]
    records = read_predictions(folder / PREDICTIONS)
    first = records[0]["question"], records[0]["prediction"]
    return TestResults(metrics, [record["scores"]["f1"] for record in records], first, seconds)


def table(closed: TestResults, bare: TestResults, tuned: TestResults, run: Path, seconds: float) -> Table:
    """Returns a table of the tests without passages, with passages, and with passages and a soft prompt."""
    sides = (closed, bare, tuned)
    title = f"{len(bare.scores)} test questions, the backbone is frozen"
    result = Table("", "closed book", "RAG, zero-shot", "RAG + soft prompt", title=title)
    for name in MEASURES:
        result.add_row(name, *(with_interval(side.metrics, f"test/{name}") for side in sides))
    hits = f"{bare.metrics['test/hit@1']:.3f}"
    result.add_row("correct passage at rank 1", "-", hits, hits)
    saved = json.loads((run / "metrics.json").read_text())
    result.add_row("trainable parameters", "0", "0", f"{saved['trainable_parameters']:,}")
    result.add_row("training", "-", "-", f"{seconds:.0f} s")
    result.add_row("test", *(f"{side.seconds:.0f} s" for side in sides))
    gains = [after - before for before, after in zip(bare.scores, tuned.scores, strict=True)]
    low, high = bootstrap(gains)
    result.caption = f"f1 gain {fmean(gains):+.3f}, 95 % paired bootstrap interval [{low:+.3f}, {high:+.3f}]"
    return result


def with_interval(metrics: Mapping[str, float], name: str) -> str:
    """A metric with its bootstrap interval."""
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    return f"{metrics[name]:.3f} [{low:.3f}, {high:.3f}]"
