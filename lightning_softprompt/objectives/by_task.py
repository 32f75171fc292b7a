"""A separate loss for each kind of task in a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.language_modeling import LanguageModeling


@final
@dataclass(frozen=True)
class ByTask(Objective):
    """One objective for tasks with classes, and another for tasks with text answers.

    In a batch of several tasks, each task is weighted by its number of rows.

    Args:
        labelled: Objective for rows with labels.
        text: Objective for rows without labels.
    """

    labelled: Objective = field(default_factory=Classification)
    text: Objective = field(default_factory=LanguageModeling)

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss."""
        parts = [part for _, _, part in batch.by_task()]
        outcomes = [self._objective_for(part)(lm, part) for part in parts]
        if len(parts) == 1:
            return outcomes[0]
        losses = []
        for part, outcome in zip(parts, outcomes, strict=True):
            share = len(part) / len(batch)
            losses.append(share * outcome.loss)
        return Outcome(torch.stack(losses).sum())

    def count(self, batch: Batch) -> Tensor:
        """Counts the terms of a single task, or the rows of several tasks."""
        parts = [part for _, _, part in batch.by_task()]
        if len(parts) > 1:
            return super().count(batch)
        return self._objective_for(parts[0]).count(parts[0])

    def _objective_for(self, batch: Batch) -> Objective:
        return self.text if batch.labels is None else self.labelled


def default_objective(classes: Classes | None, by_task: Mapping[str, Classes | None] | None) -> Objective:
    """Returns the objective of a run that names none: it depends on whether the task has classes."""
    if by_task is not None:
        return ByTask()
    return LanguageModeling() if classes is None else Classification()
