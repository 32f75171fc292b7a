"""The contract of evaluations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement
from lightning_softprompt.core.types import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LOWER = ("loss", "cross_entropy", "empty", "repetition")  # metrics of which less is better


class Evaluation(nn.Module, ABC):
    """Scores a prompted language model over the batches of a pass, by torchmetrics: exact across processes."""

    monitor: tuple[str, Literal["min", "max"]] = (
        "loss",
        "min",
    )  # the metric that says which checkpoint is best, and whether by min or max

    logged: tuple[str, ...] | None = None  # all metrics that a validation may give; None where that is not known

    ranks: str | None = None  # the score of a row that says how well it came out: the greater, the better

    stage = "test"  # of the pass

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """What the evaluation requires of a backbone, checked before a run leaves anything on disk."""
        return ()

    @abstractmethod
    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """What the model says: one record a row, with `prediction`, and `scores` by class where it is one, or None.

        Where there is more to a row than its text and target, `details` has it by name, as JSON can say it.
        """

    @abstractmethod
    def update(self, lm: PromptedLM, batch: Batch) -> Sequence[dict[str, Any] | None]:
        """Takes a batch into the metrics, and gives its records: None for a row that was left out of the pass."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The metrics of the pass, scalars by name."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets the pass."""

    def begin(self, stage: str, epoch: int) -> None:
        """A pass begins, of `val` or `test`. An evaluation that takes long may do less of it in some epochs."""
        self.stage = stage
        self.reset()

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Whether the least or the greatest value of a metric is the best."""
        return "min" if name in LOWER else "max"

    def narrow(self, drawn: Sequence[Sequence[int]] | None) -> None:
        """A pass scores these rows alone, by task; None is for all rows. An evaluation that samples rows does so here.

        Args:
            drawn: The numbers of the rows of each task, in order.
        """

    def figures(self) -> dict[str, Figure]:
        """Plots of the pass by name."""
        return {}
