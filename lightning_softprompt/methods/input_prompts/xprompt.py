"""XPrompt (Ma et al., EMNLP 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary


class XPrompt(SoftPromptModule):
    """Soft tokens pruned by the callback `Pruning`, by token and by piece of a token.

    Pruned tokens are removed from the sequence; pruned pieces are set to zero.

    Paper: Ma et al. 2022, arXiv 2210.04457
    Enters: soft tokens at the template's first slot
    Parameters: P * H, minus the pruned ones

    Args:
        length: P before pruning.
        pieces: Number of pieces of a soft token; it must divide H.
        init: Initial soft tokens (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.
    """

    kept_tokens: Tensor
    kept_pieces: Tensor

    def __init__(self, length: int = 20, pieces: int = 16, init: Init | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.length, self.pieces, self.init = length, pieces, init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H], and `kept_tokens` [P] and `kept_pieces` [P, pieces], the masks of pruning."""
        if backbone.hidden_size % self.pieces:
            raise ValueError(f"pieces must divide the backbone's width {backbone.hidden_size}, got {self.pieces}")
        self.tokens = nn.Parameter(self.init(backbone, self.length))
        self.register_buffer("kept_tokens", torch.ones(self.length, dtype=torch.bool))
        self.register_buffer("kept_pieces", torch.ones(self.length, self.pieces, dtype=torch.bool))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the soft tokens that are not pruned, the same for every row."""
        pieces = self.in_pieces(self.tokens) * self.kept_pieces[..., None]
        return SoftPrompt(tokens=pieces.flatten(1)[self.kept_tokens][None])

    def in_pieces(self, tokens: Tensor) -> Tensor:
        """Splits tokens: [P, H] -> [P, pieces, H / pieces]."""
        return tokens.unflatten(1, (self.pieces, -1))
