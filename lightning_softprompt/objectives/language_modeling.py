"""Cross entropy of the target tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch.nn.functional import cross_entropy

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
        logits = lm(batch).float().flatten(0, 1)
        smoothing = self.label_smoothing
        return Outcome(cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, label_smoothing=smoothing))
