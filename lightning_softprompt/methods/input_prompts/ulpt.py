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
    """Low-dimensional soft tokens, mapped to H by a frozen random basis: P = (Z Q) * scale + shift.

    Checkpoints store only the seed of the basis Q.

    Paper: Wu et al. 2025, arXiv 2502.04501, equation of section 3
    Enters: soft tokens at the template's first slot
    Parameters: P * R + 2 * H

    Differences from the paper: Z starts so that the soft tokens have the scale of the backbone's word embeddings.

    Args:
        length: P, the number of soft tokens.
        rank: R, number of trained dimensions.
        basis_seed: Seed of the random basis.
        common: Arguments of every method.
    """

    basis: Tensor

    def __init__(self, length: int = 100, rank: int = 16, basis_seed: int = 0, **common: Any) -> None:
        super().__init__(**common)
        self.length, self.rank, self.basis_seed = length, rank, basis_seed

    def build(self, backbone: Backbone) -> None:
        """Creates `z` [P, R], `scale` and `shift` [H], and draws `basis` [R, H]."""
        width = backbone.hidden_size
        basis = torch.randn(self.rank, width, generator=torch.Generator().manual_seed(self.basis_seed))
        self.register_buffer("basis", basis, persistent=False)
        z = torch.randn(self.length, self.rank)
        self.z = nn.Parameter(z * rms(backbone) / self.rank**0.5)
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every row."""
        return SoftPrompt(tokens=(self.z @ self.basis * self.scale + self.shift)[None])
