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
    """Soft tokens passed through a shallow network with a skip connection: P' = P + LayerNorm(W_up ReLU(W_down P)).

    Paper: Razdaibiedina et al. 2023, arXiv 2305.03937
    Enters: soft tokens at the template's first slot
    Parameters: P * H + 2 * H * M + M + 3 * H

    Differences from the paper: the gain of the layer norm starts at the scale of the backbone's word embeddings instead
    of 1, which outweighs the initial P in backbones with small embeddings.

    Args:
        length: P, the number of soft tokens.
        bottleneck: M, hidden width of the network.
        separate: Whether each soft token has a separate network.
        init: Initial soft tokens (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.
    """

    default_rate = 1e-3  # the best of three rates on SST-2, see benchmarks/LOG.md

    def __init__(
        self, length: int = 10, bottleneck: int = 400, separate: bool = False, init: Init | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        self.length, self.bottleneck, self.separate = length, bottleneck, separate
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H] and the networks."""
        self.tokens = nn.Parameter(self.init(backbone, self.length))
        networks = [self._network(backbone) for _ in range(self.length if self.separate else 1)]
        self.networks = nn.ModuleList(networks)

    def _network(self, backbone: Backbone) -> nn.Sequential:
        width = backbone.hidden_size
        norm = nn.LayerNorm(width)
        nn.init.constant_(norm.weight, rms(backbone))
        return nn.Sequential(nn.Linear(width, self.bottleneck), nn.ReLU(), nn.Linear(self.bottleneck, width), norm)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every row."""
        parts = self.tokens.tensor_split(len(self.networks))
        outputs = [part + network(part) for network, part in zip(self.networks, parts, strict=True)]
        return SoftPrompt(tokens=torch.cat(outputs)[None])
