"""One state for a row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["first", "last", "mean"]


def pool_states(states: Tensor, source: Tensor, pool: Pool) -> Tensor:
    """[B, H] of states [B, T, H], of the tokens [B, T] that are neither padding nor answer."""
    places = torch.arange(source.shape[1], device=source.device)
    weights = {
        "first": places == source.int().argmax(1, keepdim=True),
        "last": places == (source * places).amax(1, keepdim=True),
        "mean": source,
    }[pool].to(states)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
