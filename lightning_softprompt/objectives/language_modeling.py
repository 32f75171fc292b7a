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
        label_smoothing: Share of the probability that the target gives to the rest of the vocabulary.
        average: Over all target tokens of the batch; or over each row's own first, so that long answers count no more
            than short ones.
        source_weight: How much the source counts, beside the answer's 1: 0 leaves it out. Decoder-only models say their
            source too; no other family does.
    """

    label_smoothing: float = 0.0
    average: Literal["tokens", "rows"] = "tokens"
    source_weight: float = 0.0

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """The loss."""
        loss = self._averaged(lm.cross_entropy(batch, label_smoothing=self.label_smoothing), batch.targets)
        if not self.source_weight:
            return Outcome(loss)
        source = self._of_source(lm, batch)
        return Outcome(loss + self.source_weight * source, {"answer_loss": loss, "source_loss": source})

    def count(self, batch: Batch) -> Tensor:
        """Target tokens, or rows that have some."""
        said = batch.targets != IGNORE
        return said.sum() if self.average == "tokens" else said.any(1).sum()

    def _averaged(self, losses: Tensor, targets: Tensor) -> Tensor:
        said = targets != IGNORE
        if self.average == "tokens":
            return losses.sum() / said.sum()
        return (losses.sum(1) / said.sum(1).clamp(min=1)).sum() / said.any(1).sum()

    def _of_source(self, lm: PromptedLM, batch: Batch) -> Tensor:
        source = lm.backbone.language_modeling_view(batch)
        losses = lm.backbone.cross_entropy(source, lm.prompt(batch), self.label_smoothing)
        return self._averaged(losses, source.targets)
