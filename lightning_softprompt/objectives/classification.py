"""Cross entropy of the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.objectives.base import Objective, Outcome


@final
@dataclass(frozen=True)
class Classification(Objective):
    """Mean cross entropy over class scores, as the readout gives them: probability that goes to no class is no loss.

    The mean is over rows, or over all words of the batch that have a class.

    Args:
        label_smoothing: Share of the probability that the target gives to the other classes.
    """

    label_smoothing: float = 0.0

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """The loss."""
        if batch.labels is None:
            raise ValueError("Classification wants rows with labels; use LanguageModeling where there are none")
        scores, labels = lm.scores(batch).flatten(0, -2), batch.labels.flatten()
        return Outcome(cross_entropy(scores, labels, ignore_index=IGNORE, label_smoothing=self.label_smoothing))

    def count(self, batch: Batch) -> Tensor:
        """Rows, or words, that have a class."""
        return super().count(batch) if batch.labels is None else (batch.labels != IGNORE).sum()
