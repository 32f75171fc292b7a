"""A reward for answers of a given length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_texts
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward


@final
@dataclass(frozen=True)
class Length(Reward):
    """The negative distance of the number of words from a target, relative to the target.

    An answer of the target length has the reward 0, an empty answer -1.

    Args:
        words: The target number of words, separated by white space.

    Raises:
        ValueError: If the target is below 1.
    """

    words: int = 10

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words of Length must be at least 1, got {self.words}")

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B]."""
        counts = [len(text.split()) for text in answer_texts(lm, batch)]
        return self.tensor([-abs(count - self.words) / self.words for count in counts], batch)
