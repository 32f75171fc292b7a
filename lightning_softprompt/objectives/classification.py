"""Cross entropy over class scores."""

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
    """Mean cross entropy over the class scores of the readout; probability outside the classes does not count.

    The mean is over rows, or over all words of the batch that have a class.

    Args:
        label_smoothing: Target probability that is distributed over all classes.
    """

    label_smoothing: float = 0.0

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss."""
        if batch.labels is None:
            raise ValueError("Classification requires rows with labels; use LanguageModeling for rows without labels")
        scores, labels = lm.scores(batch).flatten(0, -2), batch.labels.flatten()
        return Outcome(cross_entropy(scores, labels, ignore_index=IGNORE, label_smoothing=self.label_smoothing))

    def count(self, batch: Batch) -> Tensor:
        """Counts the rows, or words, that have a class."""
        return super().count(batch) if batch.labels is None else (batch.labels != IGNORE).sum()
