"""Several rewards together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward


@final
@dataclass(frozen=True)
class WeightedSum(Reward):
    """The weighted sum of rewards.

    Args:
        rewards: The rewards by name.
        weights: The weight of each; rewards without a weight have the weight 1.

    Raises:
        ValueError: If there are no rewards, or a weight belongs to none of them.
    """

    rewards: dict[str, Reward]
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights or {}) - set(self.rewards))
        if not self.rewards or unknown:
            raise ValueError(f"weights must name rewards {sorted(self.rewards)}, got {unknown}")

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B]."""
        weights = self.weights or {}
        terms = [weights.get(name, 1.0) * reward(lm, batch) for name, reward in self.rewards.items()]
        return torch.stack(terms).sum(0)
