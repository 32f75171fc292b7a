"""Cross entropy of the target tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.objectives.base import Objective, Outcome


@final
@dataclass(frozen=True)
class LanguageModeling(Objective):
    """Mean cross entropy over target tokens, over the whole vocabulary.

    Args:
        label_smoothing: Target probability that is distributed over the whole vocabulary.
        average: Average over all target `tokens` of the batch, or first within `rows`, so that long answers have no
            larger weight than short ones.
        source_weight: Weight of the loss on the source, relative to the answer; 0 disables it. Only decoder-only
            models have a loss on their source.
    """

    label_smoothing: float = 0.0
    average: Literal["tokens", "rows"] = "tokens"
    source_weight: float = 0.0

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss.

        Raises:
            ValueError: If the rows are answers that are compared, of which some must not be learned.
        """
        if batch.groups is not None or batch.grades is not None:
            raise ValueError(
                "LanguageModeling would also learn the rejected answers; set --model.objective to RewardModeling, DPO "
                "or another objective of preferences"
            )
        loss = self._average(lm.cross_entropy(batch, label_smoothing=self.label_smoothing), batch.targets)
        if not self.source_weight:
            return Outcome(loss)
        source = self._source_loss(lm, batch)
        return Outcome(loss + self.source_weight * source, {"answer_loss": loss, "source_loss": source})

    def count(self, batch: Batch) -> Tensor:
        """Counts the target tokens, or the rows that have some."""
        has_target = batch.targets != IGNORE
        return has_target.sum() if self.average == "tokens" else has_target.any(1).sum()

    def _average(self, losses: Tensor, targets: Tensor) -> Tensor:
        has_target = targets != IGNORE
        if self.average == "tokens":
            return losses.sum() / has_target.sum()
        row_means = losses.sum(1) / has_target.sum(1).clamp(min=1)
        return row_means.sum() / has_target.any(1).sum()

    def _source_loss(self, lm: PromptedLM, batch: Batch) -> Tensor:
        source = lm.backbone.language_modeling_view(batch)
        losses = lm.backbone.cross_entropy(source, lm.prompt(batch), self.label_smoothing)
        return self._average(losses, source.targets)
