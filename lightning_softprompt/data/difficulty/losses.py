"""Difficulty from losses of the backbone without a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_softprompt.data.difficulty.base import Difficulty, Scores, ScoringModel
from lightning_softprompt.data.prepared import PreparedRows


@final
@dataclass(frozen=True)
class BareLoss(Difficulty):
    """The loss per target token of the backbone without a prompt, from one pass that is stored in the user's cache."""

    def scores(self, rows: PreparedRows, model: ScoringModel) -> Scores:
        """Returns the loss of each row."""
        return model.bare_losses(rows)


@final
@dataclass(frozen=True)
class InstructionDifficulty(Difficulty):
    """The loss of the answer after its instruction, divided by that without it (IFD, Li et al. 2024, 2308.12032).

    Both losses are those of the backbone without a prompt; without the instruction, all columns of the template are
    empty. A ratio near 1 means that the instruction does not help to predict the answer.
    """

    def scores(self, rows: PreparedRows, model: ScoringModel) -> Scores:
        """Returns the ratio of each row."""
        return model.bare_losses(rows) / model.losses_without_source(rows).clip(min=1e-6)
