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
    """Soft tokens of which the callback `Pruning` drops those that matter least, and pieces of the others.

    Pruned tokens leave the sequence; pruned pieces are zero.

    Paper: Ma et al. 2022, arXiv 2210.04457
    Enters: soft tokens at the template's first slot
    Parameters: P * H, less what is pruned

    Args:
        length: P before pruning.
        pieces: Pieces of a soft token, which must divide H.
        init: Where the soft tokens start; None draws words of the vocabulary.
        common: Arguments of every method.
    """

    kept_tokens: Tensor
    kept_pieces: Tensor

    def __init__(self, length: int = 20, pieces: int = 16, init: Init | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.length, self.pieces, self.init = length, pieces, init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Makes `tokens` [P, H], and `kept_tokens` [P] and `kept_pieces` [P, pieces], which say what is left."""
        if backbone.hidden_size % self.pieces:
            raise ValueError(f"pieces must divide the backbone's width {backbone.hidden_size}, got {self.pieces}")
        self.tokens = nn.Parameter(self.init(backbone, self.length))
        self.register_buffer("kept_tokens", torch.ones(self.length, dtype=torch.bool))
        self.register_buffer("kept_pieces", torch.ones(self.length, self.pieces, dtype=torch.bool))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """What is left, the same for every row."""
        left = (self.in_pieces(self.tokens) * self.kept_pieces[..., None]).flatten(1)
        return SoftPrompt(tokens=left[self.kept_tokens][None])

    def in_pieces(self, tokens: Tensor) -> Tensor:
        """[P, H] -> [P, pieces, H / pieces]."""
        return tokens.unflatten(1, (self.pieces, -1))
