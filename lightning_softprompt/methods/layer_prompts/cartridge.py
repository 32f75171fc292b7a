"""Cartridges (Eyuboglu et al. 2025)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.requirements import takes_keys_and_values
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.kv_prefix import Activations, DeepPrompt


class Cartridge(SoftPromptModule):
    """A corpus as trained keys and values, initialized from its first tokens; the first positions stay frozen.

    Trained with the objective `ContextDistillation`, it learns to answer like the backbone with the corpus in context.

    Paper: Eyuboglu et al. 2025, arXiv 2506.06266
    Enters: keys and values of every layer; no slot is used
    Parameters: (P - frozen) * 2 * L * N * D

    Args:
        corpus: Text file whose first tokens initialize the keys and values.
        length: P, the number of positions.
        frozen: Number of frozen positions at the start; they act as attention sinks.
        common: Arguments of every method.
    """

    requires = (takes_keys_and_values,)

    def __init__(self, corpus: str, length: int = 256, frozen: int = 1, **common: Any) -> None:
        super().__init__(**common)
        if not 0 <= frozen < length:
            raise ValueError(f"frozen must leave some of the {length} positions to train, got {frozen}")
        if not Path(corpus).is_file():
            raise ValueError(f"corpus requires a text file; {corpus} does not exist")
        self.corpus, self.length, self.frozen = corpus, length, frozen

    def build(self, backbone: Backbone) -> None:
        """Creates `cache`."""
        (kind, sites), *others = backbone.attentions.items()
        if others:
            raise ValueError(f"Cartridge requires a backbone with one stack of layers; {backbone.spec.name} has more")
        text = Path(self.corpus).read_text(encoding="utf-8")
        if (tokens := len(backbone.codec.template_ids(text))) < self.length:
            raise ValueError(f"{self.corpus} has {tokens} tokens, fewer than length={self.length}; lower length")
        first = Activations(text, start=True)(backbone, kind, self.length)
        self.cache = DeepPrompt(sites.heads, range(len(sites)), PartlyFrozen(first, self.frozen))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same keys and values for every row."""
        return SoftPrompt(kv={"self": self.cache()})


class PartlyFrozen(nn.Module):
    """Keys and values whose first positions are frozen.

    Args:
        first: Initial keys and values [L, 2, P, N * D].
        frozen: Number of frozen positions.
    """

    fixed: Tensor

    def __init__(self, first: Tensor, frozen: int) -> None:
        super().__init__()
        self.register_buffer("fixed", first[:, :, :frozen].clone())
        self.values = nn.Parameter(first[:, :, frozen:].clone())

    def forward(self) -> Tensor:
        """Returns keys and values [L, 2, P, N * D]."""
        return torch.cat([self.fixed, self.values], dim=2)
