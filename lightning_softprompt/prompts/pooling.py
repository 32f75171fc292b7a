"""Pooling of the states of a row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["first", "last", "mean"]


def pool_states(states: Tensor, source: Tensor, pool: Pool) -> Tensor:
    """Pools states [B, T, H] to [B, H] over the source tokens [B, T], which exclude padding and answer."""
    positions = torch.arange(source.shape[1], device=source.device)
    masks = {
        "first": positions == source.int().argmax(1, keepdim=True),
        "last": positions == (source * positions).amax(1, keepdim=True),
        "mean": source,
    }
    weights = masks[pool].to(states)
    total = (states * weights[..., None]).sum(1)
    return total / weights.sum(1, keepdim=True).clamp(min=1)
