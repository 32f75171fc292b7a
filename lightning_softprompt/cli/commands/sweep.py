"""`softprompt sweep`: hyper-parameters by Optuna, as many processes at once as are started on one database."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from optuna import Study, Trial

DESCRIPTION = """\
Looks for the best options of `softprompt fit` by Optuna's tree-structured Parzen estimator. Each trial is a run of its
own, `<run.experiment>/trial-N`. The same command, given again or elsewhere, joins in until there are `trials` of them,
failed ones included. What is best is what a run says of its best validation. A sweep is a YAML file:

  storage: sweeps/lr.log     a file that all processes see, or an address such as sqlite:///sweeps/lr.db
  trials: 20
  fit: {model: PromptTuning}                         options of every run, as on the command line
  search:                                            int, float or categorical, as Optuna's suggest_int and so on
    model.length: {int: {low: 5, high: 100, log: true}}
    model.init: {categorical: {choices: [SampleVocabulary, Uniform]}}

It wants the extra `sweep`. Sweeps of W&B do without it: configs/sweep/wandb.yaml.
"""
PARTS = {"storage", "trials", "fit", "search", "seed"}
KINDS = ("float", "int", "categorical")


def parser() -> ArgumentParser:
    """The command's arguments."""
    form = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser("softprompt sweep", description=DESCRIPTION, **form)  # type: ignore[arg-type]
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep; further options are for all its runs")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, options = parser().parse_known_args(argv)
    if find_spec("optuna") is None:
        raise CommandError("sweeps want the package optuna: pip install 'lightning-softprompt[sweep]'")
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    from lightning_softprompt.studies.study_file import as_options

    sweep = read_sweep(args.file)
    try:
        fit = {**sweep.get("fit", {}), **as_options(options)}
    except ValueError as error:
        raise CommandError(str(error)) from error
    study = study_of(sweep, args.file.stem, fit)
    ended = (TrialState.COMPLETE, TrialState.FAIL)
    enough = MaxTrialsCallback(sweep["trials"], states=ended)
    if len(study.get_trials(deepcopy=False, states=ended)) < sweep["trials"]:
        study.optimize(lambda trial: run(trial, sweep["search"], fit), callbacks=[enough], catch=(RunFailedError,))
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        raise CommandError("no trial came to an end; see what they said above")
    best = study.best_trial
    print(json.dumps({"trials": len(done), "best": best.number, "value": best.value, "options": best.params}, indent=2))
    return 0


class RunFailedError(RuntimeError):
    """A trial's run ended with an error."""


def read_sweep(path: Path) -> dict[str, Any]:
    """What a file says.

    Raises:
        CommandError: If it is no sweep.
    """
    from lightning_softprompt.system.plain_yaml import read_yaml

    try:
        said = read_yaml(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(said, dict) or not {"storage", "trials", "search"} <= set(said) <= PARTS:
        raise CommandError(f"{path} must be a mapping with storage, trials and search, and may have fit and seed")
    for name, how in said["search"].items():
        if not isinstance(how, dict) or len(how) != 1 or not set(how) <= set(KINDS):
            raise CommandError(f"{path}: {name} wants one of {', '.join(KINDS)} and its arguments, got {how}")
    return said


def study_of(sweep: dict[str, Any], name: str, fit: dict[str, Any]) -> Study:
    """The study on its database, which processes share; the metric says in which direction it looks."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    from lightning_softprompt.cli.dry_parse import parsed
    from lightning_softprompt.runs.run_spec import RunSpec
    from lightning_softprompt.studies.study import words
    from lightning_softprompt.training.monitors import watched

    made = parsed(["fit", *words(fit)])
    run = RunSpec(**made.config.run.as_dict())
    place, (_, mode) = str(sweep["storage"]), watched(run, made.data.evaluation)
    if "://" not in place or place.startswith("sqlite:///"):
        Path(place.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    storage: Any = place if "://" in place else optuna.storages.JournalStorage(JournalFileBackend(place))
    sampler = optuna.samplers.TPESampler(seed=sweep.get("seed"), constant_liar=True)
    direction: Any = {"min": "minimize", "max": "maximize"}[mode]
    return optuna.create_study(
        study_name=name, storage=storage, sampler=sampler, direction=direction, load_if_exists=True
    )


def run(trial: Trial, search: dict[str, dict[str, Any]], fit: dict[str, Any]) -> float:
    """The score of the best validation of a trial's run, which is a process of its own.

    Raises:
        RunFailedError: If it ended with an error, or its score is none.
    """
    from lightning_softprompt.studies.study import words

    asked = [(name, *next(iter(how.items()))) for name, how in search.items()]
    drawn = {name: getattr(trial, f"suggest_{kind}")(name, **of) for name, kind, of in asked}
    options = {"run.experiment": trial.study.study_name, **fit, **drawn, "run.name": f"trial-{trial.number}"}
    code = subprocess.call([sys.executable, "-m", "lightning_softprompt", "fit", *words(options)])
    report = Path(str(options.get("run.folder", "runs")), str(options["run.experiment"]), f"trial-{trial.number}")
    if code != 0 or not (report / "metrics.json").is_file():
        raise RunFailedError(f"trial {trial.number} ended with code {code}")
    best = json.loads((report / "metrics.json").read_text())["best"]
    if best is None:
        raise RunFailedError(f"trial {trial.number} has no validation to go by")
    return float(best["value"])
