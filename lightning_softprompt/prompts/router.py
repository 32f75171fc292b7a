"""Which of several prompts a row gets, by what its input says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_softprompt.core.types import Batch
from lightning_softprompt.prompts.networks import at_least_float32
from lightning_softprompt.prompts.pooling import pool_states


@dataclass(frozen=True)
class Routing:
    """What a router decided for each row.

    Args:
        probabilities: [B, N] of N experts.
        chosen: [B] the likeliest of them.
    """

    probabilities: Tensor
    chosen: Tensor

    @property
    def selected(self) -> Tensor:
        """[B, N], 1 at the chosen expert."""
        return nn.functional.one_hot(self.chosen, self.probabilities.shape[1]).to(self.probabilities)

    @property
    def balance(self) -> Tensor:
        """1 where all experts are used alike, N where only one is (Fedus et al. 2021, arXiv 2101.03961, eq. 4)."""
        share, mean = self.selected.mean(0), self.probabilities.mean(0)
        return self.probabilities.shape[1] * (share * mean).sum()

    @property
    def usage(self) -> dict[str, Tensor]:
        """The share of rows that each expert got."""
        return {f"usage/expert_{number}": share for number, share in enumerate(self.selected.mean(0))}


class Router(nn.Module):
    """A linear map of a row's mean input embedding to N experts, with multiplicative noise while training.

    Args:
        width: H.
        experts: N.
        noise: Standard deviation of the noise.
        bias: Whether the map has one.
    """

    def __init__(self, width: int, experts: int, noise: float, bias: bool) -> None:
        super().__init__()
        self.noise = noise
        self.linear = nn.Linear(width, experts, bias)
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, features: Tensor) -> Routing:
        """Of features [B, H]."""
        scores = self.linear(features)
        if self.training and self.noise:
            scores = scores * (1 + torch.randn_like(scores) * self.noise)
        probabilities = scores.softmax(-1)
        return Routing(probabilities, probabilities.argmax(-1))


def mean_embedding(embeds: Tensor, batch: Batch) -> Tensor:
    """[B, H] in float32: the mean over what a method may look at, of embeddings [B, T, H]."""
    return pool_states(at_least_float32(embeds), batch.source, "mean")
