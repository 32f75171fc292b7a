"""The option `extra_metrics`: metrics of torchmetrics and evaluations that the user adds to a task."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, final

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.case_ranking import CaseRanking
from lightning_softprompt.evaluation.metrics.extra import snake_case

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class UserMetrics:
    """The metrics and evaluations that the user adds to a task.

    Args:
        metrics: Metrics of torchmetrics, which the evaluation of the task updates.
        evaluations: Evaluations in addition to that of the task.
    """

    metrics: tuple[Metric, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()

    @classmethod
    def from_option(cls, option: Metric | Evaluation | Sequence[Metric | Evaluation] | None) -> UserMetrics:
        """Divides the values of the option.

        Raises:
            ValueError: If a value is neither a metric nor an evaluation.
        """
        values = option if isinstance(option, Sequence) else [] if option is None else [option]
        for value in values:
            if not isinstance(value, Metric | Evaluation):
                hint = f"; pass an object, {value.__name__}(...)" if isinstance(value, type) else ""
                raise ValueError(f"extra_metrics requires metrics of torchmetrics or evaluations, got {value!r}{hint}")
        metrics = tuple(value for value in values if isinstance(value, Metric))
        return cls(metrics, tuple(value for value in values if isinstance(value, Evaluation)))

    def extend(self, default: Evaluation) -> Evaluation:
        """Returns the evaluation of a task, extended by the evaluations of the user if there are any."""
        return ExtendedEvaluation(default, self.evaluations) if self.evaluations else default


@final
class ExtendedEvaluation(Evaluation):
    """The evaluation of a task with the metrics and figures of further evaluations.

    Records, the page of cases and the default monitor are those of the task. Figures of a further evaluation have its
    class name in snake case before their name.

    Args:
        default: The evaluation of the task.
        added: Further evaluations. They are copied.

    Raises:
        ValueError: If two evaluations log a metric of the same name.
    """

    def __init__(self, default: Evaluation, added: Sequence[Evaluation]) -> None:
        super().__init__()
        self.evaluations = nn.ModuleList([default, *(deepcopy(evaluation) for evaluation in added)])
        self.monitor = default.monitor
        self.ranking_score = default.ranking_score
        self.by_class = tuple(name for evaluation in self._all for name in evaluation.by_class)
        names: list[str] = []
        for evaluation in self._all:
            _refuse_duplicates(evaluation, evaluation.logged or (), {"loss", *names})
            names += evaluation.logged or ()
        is_known = all(evaluation.logged is not None for evaluation in self._all)
        self.logged = tuple(names) if is_known else None

    @property
    def _all(self) -> list[Evaluation]:
        return [cast(Evaluation, evaluation) for evaluation in self.evaluations]

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """The requirements of all evaluations."""
        return tuple(requirement for evaluation in self._all for requirement in evaluation.requires)

    @property
    def case_ranking(self) -> CaseRanking | None:
        """The ranking of the task."""
        return self._all[0].case_ranking

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the records of the task."""
        return self._all[0].predict(lm, batch)

    def update(self, lm: PromptedLM, batch: Batch) -> Sequence[dict[str, Any] | None]:
        """Adds a batch to the metrics of all evaluations and returns the records of the task."""
        records = [evaluation.update(lm, batch) for evaluation in self._all]
        return records[0]

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics of all evaluations.

        Raises:
            ValueError: If two evaluations compute a metric of the same name.
        """
        results: dict[str, Tensor] = {}
        for evaluation in self._all:
            metrics = evaluation.compute()
            _refuse_duplicates(evaluation, metrics, results)
            results |= metrics
        return results

    def reset(self) -> None:
        """Resets the metrics of all evaluations."""
        for evaluation in self._all:
            evaluation.reset()

    def begin(self, stage: str, epoch: int) -> None:
        """Starts all evaluations."""
        self.stage = stage
        for evaluation in self._all:
            evaluation.begin(stage, epoch)

    def limit_rows(self, rows: Sequence[Sequence[int]] | None) -> None:
        """Announces to all evaluations which rows will be scored."""
        for evaluation in self._all:
            evaluation.limit_rows(rows)

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better, according to the evaluation that logs it."""
        default, *added = self._all
        logging = [evaluation for evaluation in added if name in (evaluation.monitor[0], *(evaluation.logged or ()))]
        return (logging or [default])[0].mode_of(name)

    def figures(self) -> dict[str, Figure]:
        """Returns the plots of all evaluations."""
        default, *added = self._all
        figures = default.figures()
        for evaluation in added:
            prefix = snake_case(type(evaluation).__name__)
            figures |= {f"{prefix}_{name}": figure for name, figure in evaluation.figures().items()}
        return figures


def _refuse_duplicates(evaluation: Evaluation, names: Iterable[str], reserved: Container[str]) -> None:
    duplicates = [name for name in names if name in reserved]
    if duplicates:
        raise ValueError(
            f"extra_metrics: {type(evaluation).__name__} has the metric {duplicates[0]!r}, but there is another metric "
            "of that name; rename one of the two"
        )
