"""A penalty for answers that do not end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.generation.answers import are_finished
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward


@final
@dataclass(frozen=True)
class Unfinished(Reward):
    """-1 for an answer that reaches the maximum number of tokens before it ends, else 0.

    Combine it with another reward in `WeightedSum`.
    """

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B]."""
        return are_finished(lm, batch).float() - 1
