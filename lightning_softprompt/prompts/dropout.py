"""Dropout of a soft prompt, and noise on the embeddings of input tokens, both in training only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import dropout

from lightning_softprompt.core.types import Batch, SoftPrompt


def apply_dropout(prompt: SoftPrompt, rate: float) -> SoftPrompt:
    """Applies dropout to all tensors of a prompt.

    Tensors that are shared by all rows have one mask for all rows.
    """
    kv: dict[str, Any] = {kind: {} for kind in prompt.kv}
    for kind, layers in prompt.kv.items():
        for layer, (key, value) in layers.items():
            kv[kind][layer] = dropout(key, rate), dropout(value, rate)
    tokens = None if prompt.tokens is None else dropout(prompt.tokens, rate)
    hidden = {layer: dropout(states, rate) for layer, states in prompt.hidden.items()}
    deep = {layer: dropout(states, rate) for layer, states in prompt.deep.items()}
    image = None if prompt.image is None else apply_dropout(prompt.image, rate)
    return replace(prompt, tokens=tokens, kv=kv, hidden=hidden, deep=deep, image=image)


def add_embedding_noise(prompt: SoftPrompt, noise: Tensor) -> SoftPrompt:
    """Returns the prompt with noise [B, T, H] added to its shift of the embeddings."""
    return replace(prompt, shift=noise if prompt.shift is None else prompt.shift + noise)


def embedding_noise(batch: Batch, size: int, alpha: float, seed: int, epoch: int) -> Tensor:
    """Returns uniform noise [B, T, H] between -alpha / sqrt(T H) and alpha / sqrt(T H) (NEFTune, Jain et al. 2024).

    T is the number of input tokens of the row, without padding and soft tokens. The noise of a row depends only on
    seed, epoch and row, neither on the other rows of the batch nor on padding.

    Args:
        batch: The rows.
        size: H, the hidden size.
        alpha: Scale of the noise; 5 to 15 in the paper.
        seed: Seed of the noise.
        epoch: The epoch.
    """
    noise = torch.zeros(*batch.mask.shape, size)
    masks = batch.mask.cpu()
    for b, row_id in enumerate(batch.global_row_ids):
        tokens = int(masks[b].sum())
        limit = alpha / (tokens * size) ** 0.5
        draw = np.random.default_rng((seed, epoch, row_id))
        noise[b, masks[b]] = torch.from_numpy(draw.random((tokens, size), dtype=np.float32) * 2 - 1) * limit
    return noise.to(batch.mask.device)
