"""Attention of a row over several prompts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_softprompt.core.types import Batch
from lightning_softprompt.prompts.networks import at_least_float32


class PromptAttention(nn.Module):
    """Attention of a row over J prompts: softmax_j(key_j . LN(W_up SiLU(W_down x)) / t) (Asai et al. 2022, eq. 1 to 3).

    Args:
        width: H.
        bottleneck: M, hidden width.
        temperature: t (default: e * H).
    """

    def __init__(self, width: int, bottleneck: int, temperature: float | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.temperature = torch.e * width if temperature is None else temperature

    def forward(self, features: Tensor, keys: Tensor) -> Tensor:
        """Computes weights [B, J] with sum 1 from features [B, H] and keys [B|1, J, H]."""
        query = self.norm(self.up(nn.functional.silu(self.down(features))))
        scores = (keys @ query[..., None])[..., 0] / self.temperature
        return scores.softmax(-1)


def max_embedding(embeds: Tensor, batch: Batch) -> Tensor:
    """Max-pools embeddings [B, T, H] over the source tokens: [B, H] in float32."""
    is_outside = ~batch.source[..., None]
    masked = at_least_float32(embeds).masked_fill(is_outside, float("-inf"))
    has_source = batch.source.any(1, keepdim=True)
    return masked.amax(1).masked_fill(~has_source, 0.0)
