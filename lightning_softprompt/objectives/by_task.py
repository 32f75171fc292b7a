"""Tasks of one run, each by its own loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.language_modeling import LanguageModeling


@final
@dataclass(frozen=True)
class ByTask(Objective):
    """One objective for the rows of tasks that have classes, and another for those that are answered by text.

    In a batch of several tasks each counts by its rows.

    Args:
        labelled: For rows with labels.
        text: For rows without.
    """

    labelled: Objective = field(default_factory=Classification)
    text: Objective = field(default_factory=LanguageModeling)

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """The loss."""
        parts = [(len(own), self._objective_for(own)(lm, own)) for _, _, own in batch.by_task()]
        if len(parts) == 1:
            return parts[0][1]
        return Outcome(torch.stack([rows / len(batch) * outcome.loss for rows, outcome in parts]).sum())

    def count(self, batch: Batch) -> Tensor:
        """Those of a single task; rows, where there are several."""
        parts = [own for _, _, own in batch.by_task()]
        return self._objective_for(parts[0]).count(parts[0]) if len(parts) == 1 else super().count(batch)

    def _objective_for(self, batch: Batch) -> Objective:
        return self.text if batch.labels is None else self.labelled
