"""Residual prompt tuning (Razdaibiedina et al., Findings of ACL 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary, rms


class ResidualPromptTuning(SoftPromptModule):
    """Soft tokens behind a shallow network with a skip connection: P' = P + LayerNorm(W_up ReLU(W_down P)).

    Paper: Razdaibiedina et al. 2023, arXiv 2305.03937
    Enters: soft tokens at the template's first slot
    Parameters: P * H + 2 * H * M + M + 3 * H

    Differences from the paper: the layer norm starts with a gain of the size of the backbone's word embeddings, not of
    1, which in backbones with small embeddings drowns the start of P.

    Args:
        length: P, soft tokens.
        bottleneck: M, width of the network's middle.
        separate: Whether each soft token has a network of its own.
        init: Where the soft tokens start; None draws words of the vocabulary.
        common: Arguments of every method.
    """

    default_rate = 1e-3  # the best of three on SST-2, benchmarks/LOG.md

    def __init__(
        self, length: int = 10, bottleneck: int = 400, separate: bool = False, init: Init | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        self.length, self.bottleneck, self.separate = length, bottleneck, separate
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Makes `tokens` [P, H] and the networks."""
        self.tokens = nn.Parameter(self.init(backbone, self.length))
        networks = [self._network(backbone) for _ in range(self.length if self.separate else 1)]
        self.networks = nn.ModuleList(networks)

    def _network(self, backbone: Backbone) -> nn.Sequential:
        width = backbone.hidden_size
        norm = nn.LayerNorm(width)
        nn.init.constant_(norm.weight, rms(backbone))
        return nn.Sequential(nn.Linear(width, self.bottleneck), nn.ReLU(), nn.Linear(self.bottleneck, width), norm)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same soft tokens for every row."""
        parts = self.tokens.tensor_split(len(self.networks))
        moved = [part + network(part) for network, part in zip(self.networks, parts, strict=True)]
        return SoftPrompt(tokens=torch.cat(moved)[None])
