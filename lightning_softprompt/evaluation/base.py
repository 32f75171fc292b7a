"""The base class of evaluations, which score the predictions of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.case_ranking import ByScore, CaseRanking

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LOWER_IS_BETTER = ("loss", "cross_entropy", "empty", "repetition")


class Evaluation(nn.Module, ABC):
    """Scores a prompted language model on a split. Metrics use torchmetrics and are exact across processes."""

    monitor: tuple[str, Literal["min", "max"]] = ("loss", "min")  # the metric that selects the best checkpoint
    logged: tuple[str, ...] | None = None  # all metrics that a validation may log; None if they are unknown
    by_class: tuple[str, ...] = ()  # the metrics of single classes
    of_retrieval: tuple[str, ...] = ()  # the metrics of the search for passages
    ranking_score: str | None = None  # the score by which rows are ranked: the greater, the better
    stage = "test"  # `val` or `test`

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """What the evaluation requires of a backbone. It is checked before the run folder is created."""
        return ()

    @property
    def sections(self) -> Mapping[str, tuple[str, ...]]:
        """The metrics that W&B shows apart from the others, by the name of their section."""
        return {"by_class": self.by_class, "retrieval": self.of_retrieval}

    @property
    def case_ranking(self) -> CaseRanking | None:
        """How the page of cases of a test selects its rows; None for no page."""
        return None if self.ranking_score is None else ByScore(self.ranking_score)

    @abstractmethod
    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns one record per row, with `prediction`, and with `scores` by class or None.

        Further values of a row, which must be JSON serializable, are in `details`.
        """

    @abstractmethod
    def update(self, lm: PromptedLM, batch: Batch) -> Sequence[dict[str, Any] | None]:
        """Adds a batch to the metrics and returns its records; the record of a row that is not scored is None."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics as scalars by name."""

    @abstractmethod
    def reset(self) -> None:
        """Resets the metrics."""

    def begin(self, stage: str, epoch: int) -> None:
        """Starts an evaluation.

        Args:
            stage: `val` or `test`.
            epoch: The training epoch. Expensive evaluations may do less work in some epochs.
        """
        self.stage = stage
        self.reset()

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        monitored, mode = self.monitor
        if name == monitored:
            return mode
        return "min" if name in LOWER_IS_BETTER else "max"

    def limit_rows(self, rows: Sequence[Sequence[int]] | None) -> None:
        """Announces which rows will be scored. Evaluations that sample rows choose their sample here.

        Args:
            rows: The sorted row ids of each task; None for all rows.
        """

    def figures(self) -> dict[str, Figure]:
        """Returns plots of the results by name."""
        return {}
