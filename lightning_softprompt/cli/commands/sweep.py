"""`softprompt sweep`: hyperparameter search with Optuna; several processes may share one database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import QUIET_VARIABLE, command_line, suggest
from lightning_softprompt.system.durations import describe_seconds
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

    from lightning_softprompt.cli.dry_parse import ParsedRun

DESCRIPTION = """\
Search for the best options of `softprompt fit` with Optuna's tree-structured Parzen estimator. Each trial is a run in
its own folder, `<run.experiment>/trial-N`. Start the same command several times, on one or several machines, to run
trials in parallel: all processes stop when `trials` trials have ended, including failed ones. The objective is each
run's best validation metric. At the end, the sweep prints its trials and the importance of each option, and writes
results.json and a plot. A sweep is a YAML file:

  storage: sweeps/lr.log     a file that all processes can access, or an address such as sqlite:///sweeps/lr.db
  trials: 20
  fit: {model: PromptTuning}                         options of every run, as on the command line
  search:                                            int, float or categorical, with the arguments of suggest_int, ...
    model.length: {int: {low: 5, high: 100, log: true}}
    model.init: {categorical: {choices: [SampleVocabulary, Uniform]}}

Requires: pip install 'lightning-softprompt[sweep]'. W&B sweeps need no extra package: see configs/sweep/wandb.yaml.
"""
SECTIONS = {"storage", "trials", "fit", "search", "seed"}
DISTRIBUTIONS = ("float", "int", "categorical")


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt sweep", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep file; further options apply to all runs")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, options = parser().parse_known_args(argv)
    if find_spec("optuna") is None:
        raise CommandError("sweep requires optuna: pip install 'lightning-softprompt[sweep]'")
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    from lightning_softprompt.cli.dry_parse import parse_run
    from lightning_softprompt.cli.run_hints import evaluation_command
    from lightning_softprompt.cli.sweep_report import SweepReport
    from lightning_softprompt.runs.run_spec import RunSpec
    from lightning_softprompt.studies.options import parse_arguments, to_arguments
    from lightning_softprompt.training.monitors import choose_monitor

    sweep = read_sweep(args.file)
    try:
        fit = {**sweep.get("fit", {}), **parse_arguments(options)}
    except ValueError as error:
        raise CommandError(str(error)) from error
    run = parse_run(["fit", *to_arguments(fit)])
    study = create_study(sweep, args.file.stem, run)
    run_spec = RunSpec(**run.config.run.as_dict())
    metric, mode = choose_monitor(run_spec, run.data.evaluation)
    ended = (TrialState.COMPLETE, TrialState.FAIL)
    stop = MaxTrialsCallback(sweep["trials"], states=ended)
    if len(study.get_trials(deepcopy=False, states=ended)) < sweep["trials"]:
        print_result = partial(report_trial, total=sweep["trials"], metric=metric)
        objective = partial(run_trial, search=sweep["search"], fit=fit)
        study.optimize(objective, callbacks=[stop, print_result], catch=(RunFailedError,))
    report = SweepReport(study, sweep["search"], metric, mode)
    if not report.trials_with_result:
        raise CommandError("no trial finished; see the errors above")
    summary = report.summarize()
    print(json.dumps(summary, indent=2))
    folder = run_folder({"run.experiment": study.study_name, **fit}, summary["best"])
    print(f"\n{report.format()}\n", file=sys.stderr)
    plot = folder.parent / f"{study.study_name}.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    report.draw().savefig(plot, dpi=150)
    print(f"Wrote {plot} and {report.write(folder.parent)}", file=sys.stderr)
    report.log_to_wandb(folder.parent, run_spec.project, run_spec.wandb)
    checkpoint = folder.absolute() / "checkpoints" / "best.ckpt"
    if checkpoint.is_file():  # another machine may have run the trial
        suggest(command_line(evaluation_command(run.data), "--ckpt_path", checkpoint))
    return 0


class RunFailedError(RuntimeError):
    """The run of a trial failed."""


def read_sweep(path: Path) -> dict[str, Any]:
    """Read and check a sweep file.

    Raises:
        CommandError: If it is not a valid sweep.
    """
    from lightning_softprompt.system.plain_yaml import read_yaml

    try:
        sweep = read_yaml(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(sweep, dict) or not {"storage", "trials", "search"} <= set(sweep) <= SECTIONS:
        raise CommandError(f"{path} must be a mapping with storage, trials and search, and optionally fit and seed")
    for name, distribution in sweep["search"].items():
        is_valid = isinstance(distribution, dict) and len(distribution) == 1 and set(distribution) <= set(DISTRIBUTIONS)
        if not is_valid:
            raise CommandError(
                f"{path}: {name} requires one of {', '.join(DISTRIBUTIONS)} with its arguments, got {distribution}"
            )
    return sweep


def create_study(sweep: dict[str, Any], name: str, run: ParsedRun) -> Study:
    """Open the study in its database, or create it; the monitored metric determines the direction."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    from lightning_softprompt.runs.run_spec import RunSpec
    from lightning_softprompt.training.monitors import choose_monitor

    run_spec = RunSpec(**run.config.run.as_dict())
    _, mode = choose_monitor(run_spec, run.data.evaluation)
    address = str(sweep["storage"])
    if "://" not in address or address.startswith("sqlite:///"):
        Path(address.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line of this command reports each trial
    storage: Any = address if "://" in address else optuna.storages.JournalStorage(JournalFileBackend(address))
    sampler = optuna.samplers.TPESampler(seed=sweep.get("seed"), constant_liar=True)
    direction: Any = {"min": "minimize", "max": "maximize"}[mode]
    return optuna.create_study(
        study_name=name, storage=storage, sampler=sampler, direction=direction, load_if_exists=True
    )


def report_trial(study: Study, trial: FrozenTrial, total: int, metric: str) -> None:
    """Print the result of a trial, and the best one so far.

    Args:
        study: The search.
        trial: The trial that has ended.
        total: Number of trials of the search.
        metric: Name of the result.
    """
    from optuna.trial import TrialState

    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    progress = f"[{len(ended)}/{total}] trial {trial.number}:"
    if trial.value is None:
        print(f"{progress} failed", file=sys.stderr)
        return
    duration = "" if trial.duration is None else f" in {describe_seconds(trial.duration.total_seconds())}"
    best = f"best so far: trial {study.best_trial.number}, {study.best_value:.4f}"
    print(f"{progress} {metric} {trial.value:.4f}{duration}; {best}", file=sys.stderr)


def run_name(number: int) -> str:
    """The name of the run of a trial."""
    return f"trial-{number}"


def run_folder(options: Mapping[str, Any], number: int) -> Path:
    """The folder of the run of a trial.

    Args:
        options: The options of the run, with `run.experiment`.
        number: The number of the trial.
    """
    return Path(str(options.get("run.folder", "runs")), str(options["run.experiment"]), run_name(number))


def run_trial(trial: Trial, search: dict[str, dict[str, Any]], fit: dict[str, Any]) -> float:
    """Run a trial in a process of its own, and return its best validation metric.

    Raises:
        RunFailedError: If the run fails or has no validation metric.
    """
    from lightning_softprompt.studies.options import describe_options, to_arguments

    sampled = {}
    for name, distribution in search.items():
        kind, arguments = next(iter(distribution.items()))
        sampled[name] = getattr(trial, f"suggest_{kind}")(name, **arguments)
    name = run_name(trial.number)
    on_wandb: dict[str, Any] = {
        "run.display_name": f"{name} {describe_options(sampled)}",
        "run.group": trial.study.study_name,
        "run.job_type": "sweep",
        "run.trial": trial.number,
    }
    options = {"run.experiment": trial.study.study_name, **on_wandb, **fit, **sampled, "run.name": name}
    environment = {**os.environ, QUIET_VARIABLE: "1"}
    command = [sys.executable, "-m", "lightning_softprompt", "fit", *to_arguments(options)]
    code = subprocess.call(command, env=environment)
    metrics = run_folder(options, trial.number) / "metrics.json"
    if code != 0 or not metrics.is_file():
        raise RunFailedError(f"trial {trial.number} failed with exit code {code}")
    best = json.loads(metrics.read_text())["best"]
    if best is None:
        raise RunFailedError(f"trial {trial.number} has no validation metric")
    return float(best["value"])
