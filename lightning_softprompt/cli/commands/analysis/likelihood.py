"""`softprompt likelihood`: bits per byte of each corpus before and after a training."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.evaluation.metrics.likelihood_changes import LikelihoodChange
    from lightning_softprompt.evaluation.words.cloze_changes import ClozeChange

DESCRIPTION = """\
Compare tests of CorpusDataModule: bits per byte of each corpus, and the change from the first run, window by window. A
negative change of the main corpus is what a training gains. A positive change of a general corpus is what the model
forgets. Intervals are 95 % bootstrap intervals over documents. Tests with data.cloze also have the accuracy of the
questions about rare terms, and its change question by question.

  softprompt test --model NoPrompt --data CorpusDataModule --data.path medical.txt \\
      --data.corpora '{general: wikitext.txt}' --run.experiment before
  softprompt test --ckpt_path CKPT --run.experiment after
  softprompt likelihood runs/before/TIME-ID runs/after/TIME-ID
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt likelihood", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of tests, the earliest first")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if len(set(args.runs)) < len(args.runs):
        raise CommandError("a run is named twice; name each run once")
    from lightning_softprompt.evaluation.metrics.likelihood_changes import compare_likelihoods
    from lightning_softprompt.evaluation.words.cloze_changes import compare_cloze

    records = {str(run): read_records(run) for run in args.runs}
    changes, cloze_changes = compare_likelihoods(records), compare_cloze(records)
    if args.json:
        print(json.dumps([*map(asdict, changes), *map(asdict, cloze_changes)], indent=2))
        return 0
    header = ["run", "corpus", "documents", "bits per byte", "change", "95 % interval"]
    rows = [[change.run, change.corpus, f"{change.documents:,}", *format_change(change)] for change in changes]
    print(table(rows, header))
    if cloze_changes:
        header = ["run", "metric", "questions", "accuracy", "change", "95 % interval"]
        rows = [
            [change.run, change.metric, f"{change.questions:,}", *format_change(change)] for change in cloze_changes
        ]
        print(f"\n{table(rows, header)}")
    return 0


def read_records(run: Path) -> list[dict[str, Any]]:
    """Reads the records of a test.

    Raises:
        CommandError: If the folder has none.
    """
    path = run / PREDICTIONS
    if not path.is_file():
        raise CommandError(f"{run} has no {PREDICTIONS}; name the run folders of `softprompt test`")
    return read_predictions(path)


def format_change(change: LikelihoodChange | ClozeChange) -> list[str]:
    """Formats a value, its change and the interval of the change."""
    value = f"{change.value:.4f}"
    if change.change is None:
        return [value, "-", "-"]
    return [value, f"{change.change:+.4f}", f"[{change.low:+.4f}, {change.high:+.4f}]"]
