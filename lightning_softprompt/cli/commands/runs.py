"""`softprompt runs`: list the runs in a folder with their method, data and scores."""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.reports.run_table import RunSummary

DESCRIPTION = """\
List the runs in a folder and its subfolders: method, data, backbone, scores and cost.

The last test of a checkpoint is shown in the line of the run that trained it; a test on other data has a line of its
own. Intervals are 95 % intervals over the rows of the test: Wilson intervals of shares such as accuracy, bootstrap
intervals of other means.

  softprompt runs                                        all runs below runs/
  softprompt runs runs/sentiment --sort test             the best test first
  softprompt runs --filter method=prefix --json          runs whose method contains "prefix", as JSON
"""
SHORT_COMMIT = 7  # characters of a git commit in the table
COLUMNS: Mapping[str, Callable[[RunSummary], Any]] = {
    "run": lambda run: str(run.folder),
    "method": lambda run: run.method,
    "data": lambda run: run.data,
    "backbone": lambda run: Path(run.backbone).name,
    "parameters": lambda run: run.trainable_parameters,
    "steps": lambda run: run.steps,
    "minutes": lambda run: run.minutes,
    "validation": lambda run: run.validation,
    "test": lambda run: run.test,
    "started": lambda run: run.started,
    "commit": lambda run: run.commit[:SHORT_COMMIT] + ("-dirty" if run.commit.endswith("-dirty") else ""),
}
DESCENDING = {"validation", "test", "started"}  # the best and the latest first


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt runs", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="folder of the runs (default: runs)",
    )
    parser.add_argument(
        "--sort", choices=list(COLUMNS), default="started", metavar="COLUMN",
        help=f"column to sort by: {', '.join(COLUMNS)}; scores and times in descending order (default: started)",
    )  # fmt: skip
    parser.add_argument(
        "--filter", action="append", default=[], metavar="COLUMN=TEXT",
        help="show only runs whose column contains the text, in any case; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    filters = [_parse_filter(text) for text in args.filter]
    if not args.folder.is_dir():
        raise CommandError(f"no folder {args.folder}; runs are written to runs/ unless --run.folder names another one")
    from lightning_softprompt.reports.run_table import find_runs

    try:
        runs = find_runs(args.folder)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    selected = [run for run in runs if all(_matches(run, column, text) for column, text in filters)]
    ordered = _sort(selected, args.sort)
    if args.json:
        print(json.dumps([asdict(run) for run in ordered], indent=2, default=str))
    elif ordered:
        print(table([_format_run(run, args.folder) for run in ordered], list(COLUMNS)))
    else:
        print(
            f"no runs in {args.folder}" if not runs else f"none of the {len(runs)} runs matches {' '.join(args.filter)}"
        )
    return 0


def _parse_filter(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or column not in COLUMNS:
        raise CommandError(f"--filter must be COLUMN=TEXT with one of the columns {', '.join(COLUMNS)}, got {text!r}")
    return column, value.casefold()


def _matches(run: RunSummary, column: str, text: str) -> bool:
    value = COLUMNS[column](run)
    return value is not None and text in str(value).casefold()


def _sort(runs: Sequence[RunSummary], column: str) -> list[RunSummary]:
    """Sorts runs by a column; runs without a value come last."""

    def value(run: RunSummary) -> Any:
        cell = COLUMNS[column](run)
        return cell.value if column in ("validation", "test") else cell

    known = [run for run in runs if COLUMNS[column](run) not in (None, "")]
    unknown = [run for run in runs if COLUMNS[column](run) in (None, "")]
    return [*sorted(known, key=value, reverse=column in DESCENDING), *unknown]


def _format_run(run: RunSummary, folder: Path) -> list[str]:
    """Formats the cells of a run, which is named by its path in the folder, or by its name if it is the folder."""
    _, *others = (_format_cell(get(run)) for get in COLUMNS.values())
    return [run.folder.name if run.folder == folder else str(run.folder.relative_to(folder)), *others]


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) or "-"
