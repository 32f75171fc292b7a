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
        return self.explain(lm, batch)[0]

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the rewards."""
        return tuple(self.rewards)

    def explain(self, lm: PromptedLM, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Computes the rewards [B], and each of them by name, without its weight."""
        weights = self.weights or {}
        parts = {name: reward(lm, batch) for name, reward in self.rewards.items()}
        terms = [weights.get(name, 1.0) * values for name, values in parts.items()]
        return torch.stack(terms).sum(0), parts
