"""Metrics of several tasks, and one number for all."""

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
    """Each task's own metrics as `<task>/<metric>`, and `macro`, the mean over tasks of the score that watches each.

    `macro` is not a number in a pass where some task was not scored, as in validations that generate nothing.

    Args:
        evaluations: By task, in the order of the tasks' numbers.
        scores: The metrics that `macro` takes, by task, where it is not what the task's evaluation is watched by.

    Raises:
        ValueError: If a score is named for no task, or a task is watched by its loss.
    """

    monitor = ("macro", "max")

    def __init__(self, evaluations: Mapping[str, Evaluation], scores: Mapping[str, str] | None = None) -> None:
        super().__init__()
        scores = scores or {}
        if unknown := set(scores) - set(evaluations):
            raise ValueError(f"scores names {sorted(unknown)}, but the tasks are {list(evaluations)}")
        watched = {name: evaluation.monitor for name, evaluation in evaluations.items() if name not in scores}
        if by_loss := [name for name, (_, mode) in watched.items() if mode == "min"]:
            raise ValueError(
                f"macro is a mean of scores of which more is better, but tasks {by_loss} are watched by their loss; "
                f"name one of their metrics, as in scores: {{{by_loss[0]}: rougeL}}"
            )
        self.names = tuple(evaluations)
        self.scores = {name: scores[name] if name in scores else watched[name][0] for name in evaluations}
        self.of_tasks = nn.ModuleDict(evaluations)
        own = [(name, evaluation.logged) for name, evaluation in evaluations.items()]
        listed = [f"{name}/{metric}" for name, logged in own for metric in logged or ()]
        self.logged = ("macro", *listed) if all(logged is not None for _, logged in own) else None

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """What the tasks' evaluations require."""
        return tuple(requirement for name in self.names for requirement in self._of(name).requires)

    def _of(self, name: str) -> Evaluation:
        return cast(Evaluation, self.of_tasks[name])

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Each row as its task has it."""
        said: dict[int, dict[str, Any]] = {}
        for task, places, own in batch.by_task():
            said |= dict(zip(places, self._of(self.names[task]).predict(lm, own), strict=True))
        return [said[b] for b in range(len(batch))]

    def update(self, lm: PromptedLM, batch: Batch) -> Sequence[dict[str, Any] | None]:
        """Takes each row into the metrics of its task."""
        records: Records = [None] * len(batch)
        for task, places, own in batch.by_task():
            for b, record in zip(places, self._of(self.names[task]).update(lm, own), strict=True):
                records[b] = record
        return records

    def compute(self) -> dict[str, Tensor]:
        """The metrics of the pass.

        Raises:
            ValueError: If a task has metrics, but not the one that `macro` takes.
        """
        by_task = {name: self._of(name).compute() for name in self.names}
        macro = fmean(self._score(name, metrics) for name, metrics in by_task.items())
        metrics = {f"{name}/{metric}": value for name, own in by_task.items() for metric, value in own.items()}
        device = next(iter(metrics.values())).device
        return {"macro": torch.tensor(macro, device=device), **metrics}

    def _score(self, name: str, metrics: Mapping[str, Tensor]) -> float:
        score = self.scores[name]
        if score not in metrics and len(metrics) > 1:  # alone stands how many answers were generated: none
            raise ValueError(f"scores names {score!r} for task {name!r}, which has {sorted(metrics)}")
        return float(metrics.get(score, float("nan")))

    def reset(self) -> None:
        """Forgets the pass."""
        for name in self.names:
            self._of(name).reset()

    def begin(self, stage: str, epoch: int) -> None:
        """A pass begins."""
        for name in self.names:
            self._of(name).begin(stage, epoch)

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """As the task has it whose metric it is."""
        task, _, metric = name.partition("/")
        return self._of(task).mode_of(metric) if task in self.names else super().mode_of(name)

    def narrow(self, drawn: Sequence[Sequence[int]] | None) -> None:
        """A pass scores some rows alone."""
        for number, name in enumerate(self.names):
            self._of(name).narrow(None if drawn is None else [drawn[number]])

    def figures(self) -> dict[str, Figure]:
        """Those of each task."""
        return {f"{name}_{kind}": figure for name in self.names for kind, figure in self._of(name).figures().items()}
