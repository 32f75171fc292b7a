"""Loss and metrics of validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast, final

from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.objectives.base import Objective

Records = list[dict[str, Any]]
TRAIN_SAMPLE = "train_sample"  # training rows that are scored like validation rows
STAGES = ("val", "test")


@final
class StageMetrics(nn.Module):
    """The mean loss and the evaluation of each stage: `val`, `test`, and `train_sample`.

    Args:
        evaluation: How answers are scored; None if they are not.
        has_loss: Whether the objective has a loss on the rows of these stages.
    """

    def __init__(self, evaluation: Evaluation | None, has_loss: bool = True) -> None:
        super().__init__()
        self.has_loss = has_loss
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in STAGES})
        self.evaluations = nn.ModuleDict()
        if evaluation is not None:
            self.evaluations.update({stage: deepcopy(evaluation) for stage in STAGES})

    def _loss(self, stage: str) -> MeanMetric:
        return cast(MeanMetric, self.losses[stage])

    def _evaluation(self, stage: str) -> Evaluation:
        if stage not in self.evaluations:
            raise ValueError("no evaluation: pass evaluation=data.evaluation to the method")
        return cast(Evaluation, self.evaluations[stage])

    def update(self, stage: str, objective: Objective, lm: PromptedLM, batch: Batch) -> Records:
        """Adds a batch and returns its records."""
        lm = objective.with_reward(lm)
        if self.has_loss:
            self._loss(stage).update(objective(lm, batch).loss, len(batch))
        records = self._evaluation(stage).update(lm, batch)
        return number_records(batch, records)

    def predict(self, lm: PromptedLM, batch: Batch) -> Records:
        """Returns the predictions for a batch, one record per row."""
        return number_records(batch, self._evaluation("test").predict(lm, batch))

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Computes the metrics of an epoch, named `<stage>/<metric>`."""
        losses = {"loss": self._loss(stage).compute()} if self.has_loss else {}
        metrics = {**losses, **self._evaluation(stage).compute()}
        return {f"{stage}/{name}": value for name, value in metrics.items()}

    def reset(self, stage: str, epoch: int, drawn: Sequence[Sequence[int]] | None) -> None:
        """Resets the metrics of a stage.

        Args:
            stage: `val`, `test` or `train_sample`.
            epoch: The epoch.
            drawn: Ids of the rows that are scored, for each task; None for all rows.
        """
        if stage == TRAIN_SAMPLE and stage not in self.losses:
            self._add_train_sample()
        self._loss(stage).reset()
        evaluation = self._evaluation(stage)
        evaluation.begin("test" if stage == "test" else "val", epoch)
        evaluation.limit_rows(drawn)

    def _add_train_sample(self) -> None:
        """Add the stage that only some runs have, so that the others do not copy their evaluation once more."""
        self.losses[TRAIN_SAMPLE] = deepcopy(self._loss("val"))
        self.evaluations[TRAIN_SAMPLE] = deepcopy(self._evaluation("val"))


def number_records(batch: Batch, records: Sequence[dict[str, Any] | None]) -> Records:
    """Adds the row ids to records. Rows that were skipped have the record None and are left out."""
    pairs = zip(batch.global_row_ids, records, strict=True)
    return [{"row": row, **record} for row, record in pairs if record is not None]
