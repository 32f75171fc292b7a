"""`softprompt study`: run a grid of experiments, each once, and report mean and confidence interval."""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from functools import partial
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.studies.study import Study
    from lightning_softprompt.studies.study_run import StudyRun

DESCRIPTION = """\
Run all experiments of a study file and report mean ± 95% CI half-width of the test metrics (Student's t over the
repetitions). Completed runs are skipped. An interrupted study resumes where it stopped; adding seeds runs only the new
ones.

A study is a YAML file:

  common:            options of every run, as on the command line of `softprompt fit`
    model: PromptTuning
    data: configs/data/sst2.yaml
    trainer.max_steps: 200
  repeat:            averaged over: here 3 data samples x 2 seeds; or a list of options,
    data.seed: [1, 2, 3]                            such as [{data.seed: 1, seed_everything: 1}, ...]
    seed_everything: [1, 2]
  compare:           one table row per value
    data.shots: [8, 32]
  stages:            consecutive runs; ${NAME} is the folder of an earlier stage
    source: {}
    target: {data: configs/data/trec6.yaml, init_from: "${source}/prompt.safetensors"}
  tests:             tests of every stage (default: test the last stage on its own data)
    sst2: {data: configs/data/sst2.yaml}
    trec6: {data: configs/data/trec6.yaml}
  metrics: [accuracy]

Only `model` and `data` are required. If stages and tests have the same names, the final average score and the backward
transfer are reported, too. Paths are relative to the current folder. Results are written to results.json (means) and
results.csv (each run) in the study's folder.
"""
EPILOG = """\
Further options apply to all runs and override those under `common`:
  softprompt study configs/study/few_shot.yaml --model DePT --data configs/data/sst2.yaml --data.path DATA/sst2
"""
USUAL = ("macro", "accuracy", "macro_f1", "f1", "rougeL", "loss")  # metrics that are shown unless others are named
OF_ALL = ("average", "backward transfer")  # of a sequence of tasks, in the place of a test's name


def parser() -> ArgumentParser:
    """The command's arguments."""
    form = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser("softprompt study", description=DESCRIPTION, epilog=EPILOG, **form)  # type: ignore[arg-type]
    parser.add_argument("file", type=Path, metavar="FILE", help="the study file")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="folder of the runs (default: studies/NAME)")
    parser.add_argument("--show", action="store_true", help="list the runs and their state without running them")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, options = parser().parse_known_args(argv)
    from lightning_softprompt.studies.study import lock_study
    from lightning_softprompt.studies.study_file import read_study

    try:
        study = read_study(args.file, args.folder, options)
        study_options = [args.file, *(["--folder", args.folder] if args.folder else []), *options]
        if args.show:
            print(_run_states(study.runs))
            suggest(command_line("study", *study_options))
            return 0
        with lock_study(study.folder):
            code = _run(study)
        if not code:
            suggest(command_line("study", *study_options, "--show"))
        return code
    except ValueError as error:
        raise CommandError(str(error)) from error


def _run_states(runs: Sequence[StudyRun]) -> str:
    rows = []
    for run in runs:
        state = "to do" if run.read_metrics() is None else "done"
        rows.append([str(run.folder), run.command, state])
    return table(rows, ["folder", "command", "state"])


def _run(study: Study) -> int:
    """Run the remaining trainings and tests, then print the table."""
    remaining = [run for run in study.runs if run.read_metrics() is None]
    if remaining:
        from lightning_softprompt.cli.app import main as run_command

        for number, run in enumerate(remaining, 1):
            print(f"[{number}/{len(remaining)}] {run.command} {run.folder}", file=sys.stderr, flush=True)
            if code := run.run(partial(run_command, hints=False)):
                print("Completed runs are kept; rerun the same command to continue.", file=sys.stderr)
                return code
    print(_reported(study, results(study.runs)))
    return 0


Result = dict[str, Any]  # a test's metrics, and what it is of


def results(runs: Sequence[StudyRun]) -> list[Result]:
    """The results of the tests."""
    tests = [run for run in runs if run.command == "test"]
    return [
        {"variant": test.variant, "stage": test.stage, "test": test.test, "metrics": _plain(test.read_metrics() or {})}
        for test in tests
    ]


def _plain(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Without the stage's name, and what is no number."""
    return {name.removeprefix("test/"): value for name, value in metrics.items() if value is not None}


def _reported(study: Study, found: list[Result]) -> str:
    """Leaves the files, and gives the table."""
    from lightning_softprompt.system.atomic_files import write_file

    found = [*found, *_of_sequences(study, found)]
    means = summed_up(study, found)
    write_file(study.folder / "results.csv", _csv(found).encode())
    write_file(study.folder / "results.json", f"{json.dumps(means, indent=2)}\n".encode())
    return f"{_table(study, means)}\n\n{study.folder / 'results.json'}, {study.folder / 'results.csv'}"


def _of_sequences(study: Study, found: Sequence[Result]) -> list[Result]:
    """Where each stage has a test of its name, what each variant's sequence of stages comes to."""
    from lightning_softprompt.evaluation.metrics.continual import transfer

    names = list(study.stages)
    if len(names) < 2 or set(names) != set(study.tests):
        return []
    added = []
    for variant in study.variants:
        cells = {(r["stage"], r["test"]): r["metrics"] for r in found if r["variant"] == variant}
        shared = set.intersection(*(set(metrics) for metrics in cells.values()))
        matrices = {m: [[cells[i, j][m] for j in names] for i in names] for m in sorted(shared)}
        both = {metric: transfer(matrix) for metric, matrix in matrices.items()}
        for number, name in enumerate(OF_ALL):
            metrics = {metric: moved[number] for metric, moved in both.items()}
            added.append({"variant": variant, "stage": names[-1], "test": name, "metrics": metrics})
    return added


def summed_up(study: Study, found: Sequence[Result]) -> list[Result]:
    """Mean and half of its interval over what is repeated, by what is compared, stage, test and metric."""
    from lightning_softprompt.evaluation.metrics.intervals import student_interval

    groups: dict[str, list[Result]] = {}
    for result in found:
        apart = [{name: result["variant"].get(name) for name in compared(study)}, result["stage"], result["test"]]
        groups.setdefault(json.dumps(apart), []).append(result)
    rows = []
    for key, group in groups.items():
        of, stage, test = json.loads(key)
        for metric in group[0]["metrics"]:
            values = [result["metrics"][metric] for result in group if metric in result["metrics"]]
            mean, half = student_interval(values)
            kept = {"mean": mean, "interval": half if isfinite(half) else None, "values": values}
            rows.append({"compare": of, "stage": stage, "test": test, "metric": metric, **kept})
    return rows


def compared(study: Study) -> list[str]:
    """Names of the options that set lines apart."""
    return list(dict.fromkeys(name for options in study.compare for name in options))


def _csv(found: Sequence[Result]) -> str:
    """A line for each number of each test."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    varied = list(dict.fromkeys(name for result in found for name in result["variant"]))
    writer.writerow([*varied, "stage", "test", "metric", "value"])
    for result in found:
        values = [_said(result["variant"].get(name)) for name in varied]
        rows = result["metrics"].items()
        writer.writerows([*values, result["stage"], result["test"], metric, value] for metric, value in rows)
    return text.getvalue()


def _said(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _table(study: Study, means: Sequence[Result]) -> str:
    """A line for each test, a column for each metric."""
    there = {row["metric"] for row in means}
    metrics = [name for name in study.metrics or USUAL if name in there] or sorted(there)
    cells: dict[str, dict[str, str]] = {}
    for row in means:
        said = [_said(value) for value in row["compare"].values()]
        half = "" if row["interval"] is None else f" ± {row['interval']:.3f}"
        cells.setdefault(json.dumps([*said, row["stage"], row["test"]]), {})[row["metric"]] = f"{row['mean']:.3f}{half}"
    rows = [[*json.loads(key), *(of.get(metric, "") for metric in metrics)] for key, of in cells.items()]
    return table(rows, [*compared(study), "stage", "test", *metrics])
