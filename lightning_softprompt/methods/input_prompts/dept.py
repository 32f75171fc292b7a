"""DePT (Shi and Lipani, ICLR 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary


class DePT(SoftPromptModule):
    """A short prompt, and a low-rank update of the input embeddings by position: x_t + (A B)_t * alpha / sqrt(R).

    Paper: Shi and Lipani 2024, arXiv 2309.05173
    Enters: soft tokens at the template's first slot, and the embeddings of the input
    Parameters: P * H + R * (max_tokens + H)

    Differences from the paper: positions count real tokens, on either side of padding; padding and the answer are not
    shifted, so that training and generation see the same inputs; positions past `max_tokens` are not changed.

    Args:
        length: P, the number of soft tokens.
        rank: R, rank of the update.
        max_tokens: Number of positions that are updated.
        alpha: Scale of the update.
        update_lr: Learning rate of the update; the soft tokens use the optimizer's.
        init: Initial soft tokens (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.
    """

    def __init__(
        self,
        length: int = 40,
        rank: int = 45,
        max_tokens: int = 256,
        alpha: float = 8.0,
        update_lr: float = 5e-4,
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.rank, self.max_tokens = length, rank, max_tokens
        self.scale, self.update_lr = alpha / rank**0.5, update_lr
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H], `a` [max_tokens, R] and `b` [R, H]."""
        self.tokens = nn.Parameter(self.init(backbone, self.length))
        self.a = nn.Parameter(torch.empty(self.max_tokens, self.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b = nn.Parameter(torch.zeros(self.rank, backbone.hidden_size))

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Returns parameter groups with two learning rates."""
        return self.split_groups("update", [self.a, self.b], self.update_lr)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every row, and the shift [B, T, H] of each row."""
        position = batch.mask.cumsum(1) - 1  # [B, T] counts real tokens
        reached = batch.source & (position < self.max_tokens)
        rows = self.a[position.clamp(0, self.max_tokens - 1)]  # [B, T, R]
        update = rows @ self.b * self.scale
        return SoftPrompt(tokens=self.tokens[None], shift=update * reached[..., None])
