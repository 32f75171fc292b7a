"""Decomposed prompt tuning (Xiao et al., Findings of EMNLP 2023)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, rms
from lightning_softprompt.prompts.low_rank import singular_factors, uniform_factors


class DPT(SoftPromptModule):
    """Soft tokens of low rank: P = A B.

    LoPT (Guo et al. 2024, arXiv 2406.19486) uses the same factorization. With `init`, the factors start from the
    truncated singular value decomposition of those soft tokens, as in LAMP (arXiv 2502.12200).

    Paper: Xiao et al. 2023, arXiv 2310.10094
    Enters: soft tokens at the template's first slot
    Parameters: R * (P + H)

    Differences from the paper: uniform factors start at the scale of the backbone's word embeddings, not within 0.5.

    Args:
        length: P, the number of soft tokens.
        rank: R, rank of the prompt.
        init: Soft tokens to factorize as the initial value (default: uniform factors, as in the paper).
        common: Arguments of every method.
    """

    def __init__(self, length: int = 100, rank: int = 10, init: Init | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.length, self.rank, self.init = length, rank, init

    def build(self, backbone: Backbone) -> None:
        """Creates `a` [P, R] and `b` [R, H]."""
        if self.init is None:
            a, b = uniform_factors(self.length, self.rank, backbone.hidden_size, rms(backbone))
        else:
            a, b = singular_factors(self.init(backbone, self.length), self.rank)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every row."""
        return SoftPrompt(tokens=(self.a @ self.b)[None])
