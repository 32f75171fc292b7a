"""`softprompt report`: compare runs on one HTML page."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_softprompt import __version__
from lightning_softprompt.cli.next_steps import command_line
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.reports.comparison import ComparedRun
    from lightning_softprompt.reports.run_table import RunSummary

DESCRIPTION = """\
Compare runs on one HTML page that needs no other file: scores with intervals, repetitions over seeds, paired
differences from a baseline, learning curves, score against cost, settings that differ, and predictions side by side.

  softprompt report runs/sentiment                          all runs below a folder
  softprompt report RUN1 RUN2 RUN3 --baseline RUN1          the paired differences from RUN1
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt report", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or folders with runs below")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="file to write (default: report.html)"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN",
        help="run whose test the others are compared with (default: the tested run with the fewest parameters)",
    )  # fmt: skip
    parser.add_argument(
        "--examples", type=int, default=20, metavar="N", help="rows with predictions side by side (default: 20)"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.examples < 0:
        raise CommandError(f"--examples must be at least 0, got {args.examples}")
    missing = [str(folder) for folder in args.runs if not folder.is_dir()]
    if missing:
        raise CommandError(f"no folder {', '.join(missing)}; expected run folders or folders that contain runs")
    from lightning_softprompt.reports.comparison import load_runs
    from lightning_softprompt.reports.comparison_page import comparison_page
    from lightning_softprompt.reports.experiments import Comparison

    try:
        comparison = Comparison(load_runs(_find_all(args.runs)))
        baseline = _select_baseline(comparison.runs, args.baseline)
        note = f"{command_line('report', *argv)}, {datetime.now():%F %H:%M}, Lightning SoftPrompt {__version__}"
        page = comparison_page(comparison, baseline, args.examples, note)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    write_file(args.out, page.encode())
    described = "no baseline" if baseline is None else f"baseline {comparison.name(baseline)}"
    print(f"Wrote {args.out}: {len(comparison.runs)} runs, {described}")
    return 0


def _find_all(folders: Sequence[Path]) -> list[RunSummary]:
    """Reads the runs of all folders, each run once, without intervals, which the comparison computes."""
    from lightning_softprompt.reports.run_table import find_runs

    found: dict[Path, RunSummary] = {}
    for folder in folders:
        found |= {run.folder.resolve(): run for run in find_runs(folder, with_intervals=False)}
    if not found:
        raise CommandError(f"no runs in {', '.join(map(str, folders))}; list runs with softprompt runs FOLDER")
    return list(found.values())


def _select_baseline(runs: Sequence[ComparedRun], folder: Path | None) -> ComparedRun | None:
    """Returns the run that the others are compared with; None if no run has a test."""
    if folder is not None:
        chosen = [run for run in runs if folder.resolve() in (run.summary.folder.resolve(), run.summary.test_folder)]
        if not chosen:
            names = ", ".join(str(run.summary.folder) for run in runs)
            raise CommandError(f"--baseline {folder} is not one of the runs: {names}")
        return chosen[0]
    tested = [run for run in runs if run.scores]
    return min(tested, key=lambda run: run.summary.trainable_parameters or 0, default=None)
