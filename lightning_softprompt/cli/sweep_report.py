"""The results of a hyperparameter search: in the terminal, in `results.json`, as a plot and on W&B."""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.durations import describe_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

    from lightning_softprompt.runs.loggers import WandbMode, WandbRun

RESULTS = "results.json"
WANDB_ID = "wandb_id"  # attribute of the study in its database
TOO_FEW = 2  # trials, with which an importance cannot be measured


@dataclass(frozen=True)
class SweepReport:
    """The results of a search.

    Args:
        study: The search, with at least one completed trial.
        search: The distribution of each option, as in the sweep file.
        metric: Name of the result.
        mode: `min` or `max`.
    """

    study: Study
    search: Mapping[str, Mapping[str, Any]]
    metric: str
    mode: str

    @property
    def trials(self) -> list[FrozenTrial]:
        """The trials that are completed or failed, in the order of their numbers."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    @property
    def trials_with_result(self) -> list[FrozenTrial]:
        """The trials with a result, in the order of their numbers."""
        return [trial for trial in self.trials if trial.value is not None]

    def measure_importance(self) -> dict[str, float]:
        """Measure how much of the difference between good and other trials each option explains.

        Uses PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255).

        Returns:
            The importance of each option, with a sum of 1, the most important one first. Empty if there are too few
            trials, or no option explains a difference.
        """
        from optuna.importance import PedAnovaImportanceEvaluator

        if len(self.trials_with_result) <= TOO_FEW:
            return {}
        with warnings.catch_warnings():  # that the class was experimental in Optuna 4, or all results are equal
            warnings.simplefilter("ignore")
            importance = PedAnovaImportanceEvaluator().evaluate(self.study)
        total = sum(importance.values())
        if total == 0:
            return {}
        ordered = sorted(importance, key=lambda name: -importance[name])
        return {name: importance[name] / total for name in ordered}

    def summarize(self) -> dict[str, Any]:
        """Return the best trial, the number of trials by state and the importance of the options."""
        best = self.study.best_trial
        return {
            "trials": len(self.trials_with_result),
            "failed": len(self.trials) - len(self.trials_with_result),
            "best": best.number,
            "metric": self.metric,
            "value": best.value,
            "options": best.params,
            "importance": self.measure_importance(),
        }

    def format(self) -> str:
        """Return a table of the completed trials, the best one first, and one of the importance of the options."""
        rows = []
        for trial in sorted(self.trials_with_result, key=result_of, reverse=self.mode == "max"):
            options = [_format_value(trial.params.get(name, "")) for name in self.search]
            duration = describe_seconds(seconds_of(trial))
            rows.append([str(trial.number), f"{result_of(trial):.4f}", *options, duration])
        trials = table(rows, ["trial", self.metric, *self.search, "time"])
        importance = [[name, f"{share:.0%}"] for name, share in self.measure_importance().items()]
        return f"{trials}\n\n{table(importance, ['option', 'importance'])}" if importance else trials

    def write(self, folder: Path) -> Path:
        """Write `results.json`: the summary, and each trial with its state.

        Args:
            folder: Folder of the runs of the search.

        Returns:
            The file.
        """
        from lightning_softprompt.system.atomic_files import write_file

        path = folder / RESULTS
        content = {"study": self.study.study_name, **self.summarize(), "results": self.describe_trials()}
        write_file(path, f"{json.dumps(content, indent=2)}\n".encode())
        return path

    def describe_trials(self) -> list[dict[str, Any]]:
        """Return number, state, result, seconds and options of each trial that has ended."""
        return [
            {
                "trial": trial.number,
                "state": trial.state.name,
                "value": trial.value,
                "seconds": seconds_of(trial),
                "options": dict(trial.params),
            }
            for trial in self.trials
        ]

    def draw(self) -> Figure:
        """Plot the results of the completed trials over their number and over each option."""
        from lightning_softprompt.reports.study_figures import search_figure

        options, is_log = {}, {}
        for name, distribution in self.search.items():
            options[name] = [trial.params.get(name) for trial in self.trials_with_result]
            is_log[name] = bool(next(iter(distribution.values())).get("log"))
        return search_figure(
            [result_of(trial) for trial in self.trials_with_result], options, is_log, self.metric, self.mode
        )

    def log_to_wandb(self, folder: Path, project: str, mode: WandbMode) -> None:
        """Log the search as a W&B run of its own, in the group of its trials; later calls continue this run.

        Args:
            folder: Folder of the runs of the search.
            project: The project on W&B.
            mode: The mode of W&B.
        """
        from lightning_softprompt.runs.loggers import WandbRun, make_loggers, resolve_mode
        from lightning_softprompt.runs.wandb_identity import WandbIdentity

        if resolve_mode(mode) == "disabled":
            return
        name = self.study.study_name
        earlier = self.study.user_attrs.get(WANDB_ID)
        identity = WandbIdentity(
            earlier or secrets.token_hex(4),
            name,
            group=name,
            job_type="sweep-summary",
            continues=earlier is not None,
            earlier_folder=None if earlier is None else folder,
        )
        self.study.set_user_attr(WANDB_ID, identity.id)
        for logger in make_loggers(folder, name, project, mode, (), identity):
            if isinstance(logger, WandbRun):
                self._log_to_run(logger)

    def _log_to_run(self, logger: WandbRun) -> None:
        import wandb

        summary = self.summarize()
        importance = summary.pop("importance")
        rows = []
        for trial in self.describe_trials():
            options = [trial["options"].get(name) for name in self.search]
            rows.append([trial["trial"], trial["state"], trial["value"], trial["seconds"], *options])
        columns: list[str | int] = ["trial", "state", self.metric, "seconds", *self.search]
        values = {"sweep/trials": wandb.Table(columns, rows), "sweep/plot": wandb.Image(self.draw())}
        if importance:
            shares_table = [[name, share] for name, share in importance.items()]
            values["sweep/importance"] = wandb.Table(["option", "importance"], shares_table)
        logger.experiment.log(values)
        shares = {f"importance/{name}": share for name, share in importance.items()}
        logger.experiment.summary.update({**summary, **shares})
        logger.finish()


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def result_of(trial: FrozenTrial) -> float:
    """The result of a completed trial."""
    if trial.value is None:
        raise ValueError(f"trial {trial.number} has no result")
    return trial.value


def seconds_of(trial: FrozenTrial) -> float:
    """The duration of a trial that has ended."""
    return 0.0 if trial.duration is None else trial.duration.total_seconds()
