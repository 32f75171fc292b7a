"""Router that selects one of several prompts for a row by its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_softprompt.core.types import Batch
from lightning_softprompt.prompts.networks import at_least_float32
from lightning_softprompt.prompts.pooling import pool_states


@dataclass(frozen=True)
class Routing:
    """The decisions of a router for each row.

    Args:
        probabilities: Probabilities [B, N] of N experts.
        chosen: The most probable expert [B].
    """

    probabilities: Tensor
    chosen: Tensor

    @property
    def selected(self) -> Tensor:
        """One-hot encoding [B, N] of the chosen expert."""
        return nn.functional.one_hot(self.chosen, self.probabilities.shape[1]).to(self.probabilities)

    @property
    def balance(self) -> Tensor:
        """Load-balancing loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4): 1 if balanced, N if one expert is used."""
        share, mean = self.selected.mean(0), self.probabilities.mean(0)
        return self.probabilities.shape[1] * (share * mean).sum()

    @property
    def usage(self) -> dict[str, Tensor]:
        """Fraction of rows that each expert gets."""
        return {f"usage/expert_{number}": share for number, share in enumerate(self.selected.mean(0))}


class Router(nn.Module):
    """A linear map of a row's mean input embedding to N experts, with multiplicative noise in training.

    Args:
        width: H.
        experts: N, the number of experts.
        noise: Standard deviation of the noise.
        bias: Whether the map has a bias.
    """

    def __init__(self, width: int, experts: int, noise: float, bias: bool) -> None:
        super().__init__()
        self.noise = noise
        self.linear = nn.Linear(width, experts, bias)
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, features: Tensor) -> Routing:
        """Routes rows by their features [B, H]."""
        scores = self.linear(features)
        if self.training and self.noise:
            scores = scores * (1 + torch.randn_like(scores) * self.noise)
        probabilities = scores.softmax(-1)
        return Routing(probabilities, probabilities.argmax(-1))


def mean_embedding(embeds: Tensor, batch: Batch) -> Tensor:
    """Mean-pools embeddings [B, T, H] over the source tokens: [B, H] in float32."""
    return pool_states(at_least_float32(embeds), batch.source, "mean")
