"""`softprompt study`: run a grid of experiments, each once, and report mean and confidence interval."""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.commands import RUN_COMMANDS, import_command
from lightning_softprompt.cli.next_steps import command_line, suggest, suggest_nothing
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.durations import describe_seconds
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_softprompt.studies.stage_run import StageRun
    from lightning_softprompt.studies.study import Study

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
  tests:             tests of every trained stage (default: test the last one on its own data)
    sst2: {data: configs/data/sst2.yaml}
    trec6: {data: configs/data/trec6.yaml}
  metrics: [accuracy]

A stage with `command: write` or `command: filter` writes or filters rows, to the file rows.jsonl in its folder, and one
with `command: predict` predicts. They have the options of these commands; `rows` is the file that is filtered:

  stages:
    write: {command: write, writer: LabelText, writer.labels: {negative: bad, positive: good}, count: 200}
    clean: {command: filter, rows: "${write}/rows.jsonl", filters: [Unfinished, Balance]}
    run: {data.train: "${clean}/rows.jsonl"}
  compare: {write/count: [100, 200]}   # an option of one stage; a stage that no option changes runs once

The folder of a stage with `command: vocabulary` is the tokenizer that `softprompt vocabulary extend` writes. The folder
of a stage with `command: merge` is the backbone that `softprompt merge` writes:

  stages:
    terms: {command: vocabulary, corpus: [medical.txt], general: [wikitext.txt], rows: 100}
    adapt: {data: configs/data/corpus.yaml, backbone.vocabulary: "${terms}", model: NewTokens}
    merged: {command: merge, prompt: "${adapt}/prompt.safetensors"}
    run: {data: configs/data/medquad.yaml, backbone.name: "${merged}", model: PromptTuning}
  tests:
    documents: {stages: [adapt]}       # a test of these stages only
    questions: {stages: [run]}

Only `model` and `data` are required. If stages and tests have the same names, the final average score and the backward
transfer are reported, too. Paths are relative to the current folder. Results are written to results.json (means),
results.csv (each run) and results.png (plot) in the study's folder.
"""
EPILOG = """\
Further options apply to all runs and override those under `common`:
  softprompt study configs/study/few_shot.yaml --model DePT --data configs/data/sst2.yaml --data.path DATA/sst2
"""
DEFAULT_METRICS = ("macro", "accuracy", "macro_f1", "f1", "rougeL", "loss")
SEQUENCE_SUMMARIES = ("average", "backward transfer")  # results of a sequence of stages, in the column of tests


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
        folder_option = ["--folder", args.folder] if args.folder else []
        study_options = [args.file, *folder_option, *options]
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


def _run_states(runs: Sequence[StageRun]) -> str:
    rows = []
    for run in runs:
        state = "to do" if run.read_metrics() is None else "done"
        rows.append([str(run.folder), run.command, state])
    return table(rows, ["folder", "command", "state"])


def _run(study: Study) -> int:
    """Run the remaining trainings and tests, then print the table."""
    remaining = [run for run in study.runs if run.read_metrics() is None]
    if remaining:
        start = perf_counter()
        for number, run in enumerate(remaining, 1):
            progress = f"[{number}/{len(remaining)}]"
            left = describe_time_left(perf_counter() - start, number - 1, len(remaining))
            print(f"{progress} {run.command} {run.folder}{left}", file=sys.stderr, flush=True)
            if code := run.run(_run_command):
                print("Completed runs are kept; rerun the same command to continue.", file=sys.stderr)
                return code
        seconds = describe_seconds(perf_counter() - start)
        print(f"Completed {len(remaining)} runs in {seconds}\n", file=sys.stderr, flush=True)
    print(write_report(study, results(study.runs)))
    return 0


def _run_command(argv: Sequence[str]) -> int:
    """Run a command of a stage, without suggesting a next one."""
    command, *arguments = argv
    if command in RUN_COMMANDS:
        from lightning_softprompt.cli.app import main as run

        return run(argv, hints=False)
    with suggest_nothing():
        code: int = import_command(command).main(arguments)
    return code


def describe_time_left(seconds: float, completed: int, total: int) -> str:
    """Describes the time that the remaining runs take if they are as long as the completed ones; empty at first.

    >>> describe_time_left(40, 2, 8), describe_time_left(0, 0, 8)
    (' (2 min left)', '')
    """
    if not completed:
        return ""
    return f" ({describe_seconds(seconds / completed * (total - completed))} left)"


Result = dict[str, Any]  # variant, stage, test and metrics of one test


def results(runs: Sequence[StageRun]) -> list[Result]:
    """The results of the tests."""
    collected = []
    for test in runs:
        if test.command == "test":
            metrics = _finite_metrics(test.read_metrics() or {})
            collected.append(
                {
                    "variant": test.variant,
                    "stage": test.stage,
                    "test": test.test,
                    "metrics": metrics,
                }
            )
    return collected


def _finite_metrics(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics that have a value, without the prefix `test/`."""
    finite = {name: value for name, value in metrics.items() if value is not None}
    return {name.removeprefix("test/"): value for name, value in finite.items()}


def write_report(study: Study, tests: list[Result]) -> str:
    """Write the result files, and return the table."""
    from lightning_softprompt.system.atomic_files import write_file

    all_results = [*tests, *_sequence_results(study, tests)]
    means = average_results(study, all_results)
    csv_file, json_file, plot = (study.folder / f"results.{suffix}" for suffix in ("csv", "json", "png"))
    write_file(csv_file, _format_csv(all_results).encode())
    write_file(json_file, f"{json.dumps(means, indent=2)}\n".encode())
    image = BytesIO()
    _draw_means(study, means).savefig(image, format="png", dpi=150)
    write_file(plot, image.getvalue())
    return f"{_format_table(study, means)}\n\n{json_file}, {csv_file}, {plot}"


def _sequence_results(study: Study, tests: Sequence[Result]) -> list[Result]:
    """The average score and the backward transfer of each variant, if each stage has a test of the same name."""
    from lightning_softprompt.evaluation.metrics.continual import transfer

    names = list(study.stages)
    has_all_tests = all(set(study.tests_by_stage[stage]) == set(names) for stage in names)
    if len(names) < 2 or not has_all_tests:
        return []
    added = []
    for variant in study.variants:
        of_variant = [result for result in tests if result["variant"].items() <= variant.items()]
        cells = {(result["stage"], result["test"]): result["metrics"] for result in of_variant}
        shared_metrics = set.intersection(*(set(metrics) for metrics in cells.values()))
        summaries: tuple[dict[str, float], ...] = tuple({} for _ in SEQUENCE_SUMMARIES)
        for metric in sorted(shared_metrics):
            matrix = [[cells[stage, test][metric] for test in names] for stage in names]
            for summary, value in zip(summaries, transfer(matrix), strict=True):
                summary[metric] = value
        for name, metrics in zip(SEQUENCE_SUMMARIES, summaries, strict=True):
            last_stage = names[-1]
            added.append({"variant": variant, "stage": last_stage, "test": name, "metrics": metrics})
    return added


def average_results(study: Study, tests: Sequence[Result]) -> list[Result]:
    """Mean and half-width of the interval over repetitions, by compared options, stage, test and metric."""
    from lightning_softprompt.evaluation.metrics.intervals import student_interval

    groups: dict[str, list[Result]] = {}
    for result in tests:
        options = {name: result["variant"].get(name) for name in compare_names(study)}
        key = json.dumps([options, result["stage"], result["test"]])
        groups.setdefault(key, []).append(result)
    rows = []
    for key, group in groups.items():
        options, stage, test = json.loads(key)
        for metric in group[0]["metrics"]:
            values = [result["metrics"][metric] for result in group if metric in result["metrics"]]
            mean, half_width = student_interval(values)
            interval = half_width if isfinite(half_width) else None
            place = {"compare": options, "stage": stage, "test": test, "metric": metric}
            rows.append({**place, "mean": mean, "interval": interval, "values": values})
    return rows


def compare_names(study: Study) -> list[str]:
    """Names of the compared options, which are the first columns of the table."""
    return list(dict.fromkeys(name for options in study.compare for name in options))


def _format_csv(tests: Sequence[Result]) -> str:
    """A table with one row per metric of each test."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    options = list(dict.fromkeys(name for result in tests for name in result["variant"]))
    writer.writerow([*options, "stage", "test", "metric", "value"])
    for result in tests:
        place = [_format_option(result["variant"].get(name)) for name in options]
        place += [result["stage"], result["test"]]
        for metric, value in result["metrics"].items():
            writer.writerow([*place, metric, value])
    return text.getvalue()


def _format_option(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _shown_metrics(study: Study, means: Sequence[Result]) -> list[str]:
    """The metrics of the table and the plot."""
    available = {row["metric"] for row in means}
    listed = study.metrics or DEFAULT_METRICS
    return [name for name in listed if name in available] or sorted(available)


def _draw_means(study: Study, means: Sequence[Result]) -> Figure:
    """A plot of the rows of the table."""
    from lightning_softprompt.reports.study_figures import interval_figure

    results: dict[str, dict[str, tuple[float, float | None]]] = {name: {} for name in _shown_metrics(study, means)}
    labels: dict[str, None] = {}
    for row in means:
        options = [f"{name.rpartition('.')[2]} {_format_option(value)}" for name, value in row["compare"].items()]
        stage = [row["stage"]] if len(study.stages) > 1 else []
        test = [row["test"]] if study.tests else []
        label = ", ".join([*options, *stage, *test]) or row["test"]
        labels[label] = None
        if row["metric"] in results:
            results[row["metric"]][label] = (row["mean"], row["interval"])
    return interval_figure(list(labels), results)


def _format_table(study: Study, means: Sequence[Result]) -> str:
    """A table with one row per test and one column per metric."""
    metrics = _shown_metrics(study, means)
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in means:
        options = [_format_option(value) for value in row["compare"].values()]
        key = (*options, row["stage"], row["test"])
        cell = f"{row['mean']:.3f}"
        if row["interval"] is not None:
            cell += f" ± {row['interval']:.3f}"
        cells.setdefault(key, {})[row["metric"]] = cell
    rows = []
    for key, values in cells.items():
        row_cells = [values.get(metric, "") for metric in metrics]
        rows.append([*key, *row_cells])
    return table(rows, [*compare_names(study), "stage", "test", *metrics])
