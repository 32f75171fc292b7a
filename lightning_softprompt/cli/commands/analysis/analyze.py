"""`softprompt analyze`: error analysis of a question-answering test, optionally paired against another run."""

from __future__ import annotations

import json
from argparse import SUPPRESS, ArgumentParser
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lightning_softprompt import __version__
from lightning_softprompt.cli.next_steps import command_line
from lightning_softprompt.reports.error_tables import tables
from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.reports.error_types import AnsweredRow

Wandb = Literal["auto", "online", "offline", "disabled"]
JSON, PAGE = "analysis.json", "analysis.html"
IN_QUESTION, IN_ANSWER = "new term in the question", "new term in a correct answer"


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt analyze",
        description="Group the answers of a question-answering test by kind of error, question and retrieval. "
        f"Writes {JSON} and {PAGE} to the run's folder.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of softprompt test")
    parser.add_argument("--against", type=Path, metavar="RUN2", help="another test on the same rows, to compare with")
    parser.add_argument(
        "--terms",
        type=Path,
        metavar="VOCABULARY",
        help="folder that softprompt vocabulary extend wrote: also group the rows by whether a word of the question or "
        "of a correct answer is a term that it adds",
    )
    parser.add_argument(
        "--correct-f1", type=float, default=1.0, metavar="F1", help="minimum F1 to count as correct (default: 1.0)"
    )
    parser.add_argument("--right", type=float, dest="correct_f1", default=SUPPRESS, help=SUPPRESS)  # old name
    parser.add_argument(
        "--examples", type=int, default=5, metavar="N", help="answers of each kind on the page (default: 5)"
    )
    parser.add_argument(
        "--wandb",
        choices=get_args(Wandb),
        help="log the page and its metrics to Weights & Biases (default: run.wandb of the run's config)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if not 0 < args.correct_f1 <= 1:
        raise CommandError(f"--correct-f1 must be above 0 and at most 1, got {args.correct_f1}")
    if args.examples < 0:
        raise CommandError(f"--examples must be at least 0, got {args.examples}")
    from lightning_softprompt.reports.error_analysis import analyze
    from lightning_softprompt.reports.error_page import analysis_page

    rows = read_run(args.run, args.correct_f1, args.terms)
    others = None if args.against is None else read_run(args.against, args.correct_f1)
    report = {"run": str(args.run), "correct_f1": args.correct_f1, **analyze(rows)}
    if others is not None:
        report["against"] = {"run": str(args.against), **_compare(rows, others)}
    for part in tables(report):
        print(f"{part.title}\n\n{table(part.rows, part.header)}\n")
    page = analysis_page(args.run.resolve().name, report, rows, args.examples, describe_test(args.run, "analyze", argv))
    write_file(args.run / JSON, f"{json.dumps(report, indent=1, ensure_ascii=False)}\n".encode())
    write_file(args.run / PAGE, page.encode())
    _log(args.run.resolve(), args.wandb, report, page)
    print(f"Wrote {args.run / PAGE} (examples) and {args.run / JSON} (all metrics, and the kind of each row)")
    return 0


def describe_test(folder: Path, command: str, argv: list[str]) -> str:
    """Describe a test, and the command that has written a page about it, in a line."""
    from lightning_softprompt.reports.run_table import CONFIG
    from lightning_softprompt.reports.run_table import read_run as read_summary

    parts = [command_line(command, *argv), f"{datetime.now():%F %H:%M}", f"Lightning SoftPrompt {__version__}"]
    if (folder / CONFIG).is_file():
        run = read_summary(folder, with_interval=False)
        prompt = [] if run.source is None else [str(run.source)]
        parts = [run.method, *prompt, f"data {run.data}", run.backbone, f"tested {run.started}", *parts]
    return ", ".join(parts)


def _log(folder: Path, mode: str | None, report: dict[str, Any], page: str) -> None:
    """Log the page and the metrics to the W&B run of the test, or to a new run if the test was not logged."""
    from lightning_softprompt.system.plain_yaml import read_yaml

    config = folder / "config.yaml"
    run = dict(read_yaml(config)["run"]) if config.is_file() else {}
    mode = mode or run.get("wandb", "disabled")
    if mode == "disabled":
        return
    import wandb

    from lightning_softprompt.runs.loggers import WandbRun, make_loggers
    from lightning_softprompt.runs.wandb_identity import identify_analysis

    name, group = f"{folder.name} analysis", str(run.get("group") or run.get("experiment", "default"))
    identity = identify_analysis(folder, name, group)
    project = run.get("project", "lightning-softprompt")
    loggers = make_loggers(folder, name, project, cast("Wandb", mode), (), identity)
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.experiment.log({PAGE: wandb.Html(page, inject=False)})
            summary = {name: value for name, value in report.items() if isinstance(value, float)}
            logger.experiment.summary.update(summary)
            logger.finish()


def _compare(rows: list[AnsweredRow], others: list[AnsweredRow]) -> dict[str, Any]:
    from lightning_softprompt.reports.error_analysis import compare

    try:
        return compare(rows, others)
    except ValueError as error:
        raise CommandError(str(error)) from error


def read_run(folder: Path, correct_f1: float = 1.0, vocabulary: Path | None = None) -> list[AnsweredRow]:
    """Read the answered questions from the predictions of a test.

    Args:
        folder: Folder of the test.
        correct_f1: Minimum F1 of a correct answer.
        vocabulary: Folder of an extended tokenizer, by whose terms the rows are grouped.

    Raises:
        CommandError: If the folder is not that of a test, the test has no questions, or the vocabulary is not valid.
    """
    from lightning_softprompt.reports.error_types import REQUIRED_FIELDS, AnsweredRow

    path = _find_predictions(folder)
    records = read_predictions(path)
    complete = [record for record in records if all(name in record for name in REQUIRED_FIELDS)]
    answered = [record for record in complete if record["scores"]]
    if not answered:
        missing = [name for name in REQUIRED_FIELDS if name not in (records[0] if records else {})]
        raise CommandError(
            f"{path} has {len(records)} rows, but none of them answers a question: {', '.join(missing) or 'scores'} "
            "missing; analyze requires a test of question answering, as with RagQaDataModule"
        )
    groups = [{} for _ in answered] if vocabulary is None else _group_by_terms(answered, vocabulary)
    return [AnsweredRow(record, correct_f1, more) for record, more in zip(answered, groups, strict=True)]


def _group_by_terms(records: list[dict[str, Any]], vocabulary: Path) -> list[dict[str, str]]:
    """Determine for each row whether its question and a correct answer contain a term."""
    from lightning_softprompt.vocabulary.terms import AddedTerms

    try:
        terms = AddedTerms(vocabulary)
    except ValueError as error:
        raise CommandError(f"--terms: {error}") from error
    groups = []
    for record in records:
        in_question = terms.occur_in(record["question"] or "")
        in_answer = any(terms.occur_in(answer) for answer in record["references"])
        groups.append({IN_QUESTION: _yes_or_no(in_question), IN_ANSWER: _yes_or_no(in_answer)})
    return groups


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _find_predictions(folder: Path) -> Path:
    path = folder / PREDICTIONS
    if path.is_file():
        return path
    if not folder.is_dir():
        raise CommandError(
            f"{folder} does not exist; expected a run folder of `softprompt test` (printed when the test starts)"
        )
    if path.with_name(f"{PREDICTIONS}.part").is_file():
        raise CommandError(
            f"the test of {folder} has not finished: {PREDICTIONS}.part is incomplete; wait, or run the test again"
        )
    if checkpoints := sorted((folder / "checkpoints").glob("*.ckpt")):
        best = next((c for c in checkpoints if c.stem == "best"), checkpoints[0])
        raise CommandError(
            f"{folder} is the folder of a training without {PREDICTIONS}; run a test first: "
            f"softprompt test --ckpt_path {best}"
        )
    raise CommandError(f"{folder} has no {PREDICTIONS}; expected a run folder of `softprompt test`")
