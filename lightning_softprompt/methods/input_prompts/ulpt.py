"""Ultra-low-dimensional prompt tuning (Wu, Hao and Mou 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import rms


class ULPT(SoftPromptModule):
    """Soft tokens in few dimensions, brought to H by a frozen random basis: P = (Z Q) * scale + shift.

    Of the basis Q only the seed is kept.

    Paper: Wu et al. 2025, arXiv 2502.04501, equation of section 3
    Enters: soft tokens at the template's first slot
    Parameters: P * R + 2 * H

    Differences from the paper: Z starts so that the soft tokens have the scale of the backbone's word embeddings.

    Args:
        length: P, soft tokens.
        rank: R, dimensions that are trained.
        basis_seed: Of the random basis.
        common: Arguments of every method.
    """

    basis: Tensor

    def __init__(self, length: int = 100, rank: int = 16, basis_seed: int = 0, **common: Any) -> None:
        super().__init__(**common)
        self.length, self.rank, self.basis_seed = length, rank, basis_seed

    def build(self, backbone: Backbone) -> None:
        """Makes `z` [P, R], `scale` and `shift` [H]; draws `basis` [R, H]."""
        width = backbone.hidden_size
        basis = torch.randn(self.rank, width, generator=torch.Generator().manual_seed(self.basis_seed))
        self.register_buffer("basis", basis, persistent=False)
        self.z = nn.Parameter(torch.randn(self.length, self.rank) * rms(backbone) / self.rank**0.5)
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same soft tokens for every row."""
        return SoftPrompt(tokens=(self.z @ self.basis * self.scale + self.shift)[None])
