"""Metrics of several tasks, and their macro average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, cast, final

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.base import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = list[dict[str, Any] | None]


@final
class EvaluationByTask(Evaluation):
    """Logs the metrics of each task as `<task>/<metric>`, and `macro`, the mean of one score per task.

    `macro` is NaN if a task is not scored, as in validations without generation.

    Args:
        evaluations: The evaluation of each task by name. Task ids follow this order.
        scores: The metric of each task that `macro` averages (default: the monitored metric of the task).

    Raises:
        ValueError: If `scores` names an unknown task, or the score of a task is its loss.
    """

    monitor = ("macro", "max")

    def __init__(self, evaluations: Mapping[str, Evaluation], scores: Mapping[str, str] | None = None) -> None:
        super().__init__()
        scores = scores or {}
        unknown = set(scores) - set(evaluations)
        if unknown:
            raise ValueError(f"scores names {sorted(unknown)}, but the tasks are {list(evaluations)}")
        monitored = {name: evaluation.monitor for name, evaluation in evaluations.items() if name not in scores}
        by_loss = [name for name, (_, mode) in monitored.items() if mode == "min"]
        if by_loss:
            raise ValueError(
                f"macro averages scores for which higher is better, but the tasks {by_loss} are monitored by their "
                f"loss; name one of their metrics, as in scores: {{{by_loss[0]}: rougeL}}"
            )
        self.names = tuple(evaluations)
        self.scores = {name: scores[name] if name in scores else monitored[name][0] for name in evaluations}
        self.evaluations = nn.ModuleDict(evaluations)
        logged_by_task = {name: evaluation.logged for name, evaluation in evaluations.items()}
        names = [f"{task}/{metric}" for task, logged in logged_by_task.items() for metric in logged or ()]
        self.by_class = _with_task({name: evaluation.by_class for name, evaluation in evaluations.items()})
        self.of_retrieval = _with_task({name: evaluation.of_retrieval for name, evaluation in evaluations.items()})
        self.logged = None if None in logged_by_task.values() else ("macro", *names)

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """The requirements of all tasks."""
        return tuple(requirement for name in self.names for requirement in self._evaluation(name).requires)

    def _evaluation(self, name: str) -> Evaluation:
        return cast(Evaluation, self.evaluations[name])

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Predicts each row with the evaluation of its task."""
        records: dict[int, dict[str, Any]] = {}
        for task, positions, task_batch in batch.by_task():
            predictions = self._evaluation(self.names[task]).predict(lm, task_batch)
            records |= dict(zip(positions, predictions, strict=True))
        return [records[b] for b in range(len(batch))]

    def update(self, lm: PromptedLM, batch: Batch) -> Sequence[dict[str, Any] | None]:
        """Adds each row to the metrics of its task."""
        records: Records = [None] * len(batch)
        for task, positions, task_batch in batch.by_task():
            task_records = self._evaluation(self.names[task]).update(lm, task_batch)
            for position, record in zip(positions, task_records, strict=True):
                records[position] = record
        return records

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics.

        Raises:
            ValueError: If a task has metrics, but not the one that `macro` averages.
        """
        by_task = {name: self._evaluation(name).compute() for name in self.names}
        macro = fmean(self._score(name, task_metrics) for name, task_metrics in by_task.items())
        metrics: dict[str, Tensor] = {}
        for name, task_metrics in by_task.items():
            metrics |= {f"{name}/{metric}": value for metric, value in task_metrics.items()}
        device = next(iter(metrics.values())).device
        return {"macro": torch.tensor(macro, device=device), **metrics}

    def _score(self, name: str, metrics: Mapping[str, Tensor]) -> float:
        score = self.scores[name]
        if score not in metrics and len(metrics) > 1:  # a single metric is `generated`, if nothing was generated
            raise ValueError(f"scores names {score!r} for task {name!r}, which has {sorted(metrics)}")
        return float(metrics.get(score, float("nan")))

    def reset(self) -> None:
        """Resets the metrics."""
        for name in self.names:
            self._evaluation(name).reset()

    def begin(self, stage: str, epoch: int) -> None:
        """Starts an evaluation."""
        for name in self.names:
            self._evaluation(name).begin(stage, epoch)

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better, according to its task."""
        task, _, metric = name.partition("/")
        return self._evaluation(task).mode_of(metric) if task in self.names else super().mode_of(name)

    def limit_rows(self, rows: Sequence[Sequence[int]] | None) -> None:
        """Announces which rows of each task will be scored."""
        for number, name in enumerate(self.names):
            self._evaluation(name).limit_rows(None if rows is None else [rows[number]])

    def figures(self) -> dict[str, Figure]:
        """Returns the plots of all tasks."""
        figures: dict[str, Figure] = {}
        for name in self.names:
            figures |= {f"{name}_{kind}": figure for kind, figure in self._evaluation(name).figures().items()}
        return figures


def _with_task(metrics_by_task: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the names of metrics of tasks, as `<task>/<metric>`."""
    return tuple(f"{task}/{metric}" for task, metrics in metrics_by_task.items() for metric in metrics)
