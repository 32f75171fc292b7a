"""A penalty that grows with the length of long answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_lengths
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward


@final
@dataclass(frozen=True)
class Overlong(Reward):
    """0 up to a number of tokens, then a linear decrease to -1 (Yu et al. 2025, DAPO, arXiv 2503.14476, equation 13).

    Args:
        start: Number of tokens from which on answers are penalized.
        limit: Number of tokens at which the penalty is -1.

    Raises:
        ValueError: If the limit is not above the start.
    """

    start: int
    limit: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.limit:
            raise ValueError(f"limit of Overlong must be above start, got start={self.start} and limit={self.limit}")

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B]."""
        excess = (answer_lengths(batch) - self.start) / (self.limit - self.start)
        return -excess.float().clamp(0, 1)
