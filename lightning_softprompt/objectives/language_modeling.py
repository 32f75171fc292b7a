"""Cross entropy of the target tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_softprompt.lm import PromptedLM
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.types import IGNORE, Batch


@final
@dataclass(frozen=True)
class LanguageModeling(Objective):
    """Mean cross entropy over all target tokens of the batch, over the whole vocabulary.

    Args:
        label_smoothing: Share of the probability that the target gives to the rest of the vocabulary.
    """

    label_smoothing: float = 0.0

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """The loss."""
        losses = lm.cross_entropy(batch, label_smoothing=self.label_smoothing)
        return Outcome(losses.sum() / (batch.targets != IGNORE).sum())
