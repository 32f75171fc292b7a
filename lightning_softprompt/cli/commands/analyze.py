"""`softprompt analyze`: where the answers of a test went wrong, and whether another run's are better."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lightning_softprompt.reports.error_tables import tables
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.reports.error_types import AnsweredRow

Wandb = Literal["auto", "online", "offline", "disabled"]
PREDICTIONS = "test_predictions.jsonl"
JSON, PAGE = "analysis.json", "analysis.html"


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt analyze",
        description="Split the answers of a question-answering test by kind of mistake, question and retrieval; "
        f"writes {JSON} and {PAGE} into the run's folder.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of softprompt test")
    parser.add_argument("--against", type=Path, metavar="RUN2", help="another test of the same rows, to compare with")
    parser.add_argument("--right", type=float, default=1.0, metavar="F1", help="F1 from which an answer is right (1)")
    parser.add_argument("--examples", type=int, default=5, metavar="N", help="answers of each kind on the page (5)")
    parser.add_argument(
        "--wandb",
        choices=get_args(Wandb),
        help="whether the page and its numbers go to Weights & Biases, too (what the run's config says of run.wandb)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if not 0 < args.right <= 1 or args.examples < 0:
        raise CommandError(
            f"wanted --right above 0 and up to 1 and --examples of at least 0, got {args.right} and {args.examples}"
        )
    from lightning_softprompt.reports.error_analysis import analysis
    from lightning_softprompt.reports.error_page import analysis_page

    rows = read_run(args.run, args.right)
    others = None if args.against is None else read_run(args.against, args.right)
    told = {"run": str(args.run), "right_at": args.right, **analysis(rows)}
    if others is not None:
        told["against"] = {"run": str(args.against), **_compared(rows, others)}
    for each in tables(told):
        print(f"{each.title}\n\n{table(each.rows, each.header)}\n")
    page = analysis_page(args.run.resolve().name, told, rows, args.examples)
    write_file(args.run / JSON, f"{json.dumps(told, indent=1, ensure_ascii=False)}\n".encode())
    write_file(args.run / PAGE, page.encode())
    _log(args.run.resolve(), args.wandb, told, page)
    print(f"{args.run / PAGE}: examples of each kind\n{args.run / JSON}: all numbers, and each row's kind")
    return 0


def _log(folder: Path, mode: str | None, told: dict[str, Any], page: str) -> None:
    """Gives W&B the page and the numbers, as a run beside that of the training."""
    from lightning_softprompt.system.plain_yaml import read_yaml

    config = folder / "config.yaml"
    run = dict(read_yaml(config)["run"]) if config.is_file() else {}
    mode = mode or run.get("wandb", "disabled")
    if mode == "disabled":
        return
    import wandb

    from lightning_softprompt.runs.loggers import WandbRun, make_loggers

    project = run.get("project", "lightning-softprompt")
    loggers = make_loggers(folder, f"{folder.name} analysis", project, cast("Wandb", mode), ())
    for logged in (logger.experiment for logger in loggers if isinstance(logger, WandbRun)):
        logged.log({PAGE: wandb.Html(page, inject=False)})
        logged.summary.update({name: value for name, value in told.items() if isinstance(value, float)})
        logged.finish()


def _compared(rows: list[AnsweredRow], others: list[AnsweredRow]) -> dict[str, Any]:
    from lightning_softprompt.reports.error_analysis import compared

    try:
        return compared(rows, others)
    except ValueError as error:
        raise CommandError(str(error)) from error


def read_run(folder: Path, right_at: float = 1.0) -> list[AnsweredRow]:
    """The rows of a test's predictions that are answers to questions.

    Raises:
        CommandError: If the folder is of no test, or the test of no questions.
    """
    from lightning_softprompt.reports.error_types import WANTED, AnsweredRow

    path = _predictions(folder)
    with path.open(encoding="utf-8") as lines:
        records = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    asked = [r for r in records if all(name in r for name in WANTED) and r["scores"]]
    if not asked:
        missing = [name for name in WANTED if name not in (records[0] if records else {})]
        raise CommandError(
            f"{path} has {len(records)} rows, but none that answers a question: {', '.join(missing) or 'scores'} "
            "missing; analyze takes tests of question answering, as of RagQaDataModule"
        )
    return [AnsweredRow(record, right_at) for record in asked]


def _predictions(folder: Path) -> Path:
    path = folder / PREDICTIONS
    if path.is_file():
        return path
    if not folder.is_dir():
        raise CommandError(f"no folder {folder}; wanted is that of a test, which softprompt test names as it starts")
    if path.with_name(f"{PREDICTIONS}.part").is_file():
        raise CommandError(f"the test of {folder} has not ended: {PREDICTIONS}.part is not whole; wait, or test again")
    if checkpoints := sorted((folder / "checkpoints").glob("*.ckpt")):
        best = next((c for c in checkpoints if c.stem == "best"), checkpoints[0])
        raise CommandError(
            f"{folder} is of a training and has no {PREDICTIONS}; softprompt test --ckpt_path {best} makes a folder "
            "that has"
        )
    raise CommandError(f"{folder} has no {PREDICTIONS}; wanted is the folder of a run of softprompt test")


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CommandError(f"{place}: wanted a JSON object, got {line[:60]!r} ({error}); test again") from error
    if not isinstance(record, dict):
        raise CommandError(f"{place}: wanted a JSON object, got {line[:60]!r}; test again")
    return record
