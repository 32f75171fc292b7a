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
    """A corpus as trained keys and values, which begin as those of its first tokens; the very first stay as they are.

    Trained with the objective `ContextDistillation`, it learns to answer as the backbone would with the corpus at hand.

    Paper: Eyuboglu et al. 2025, arXiv 2506.06266
    Enters: keys and values of every layer; no slot is used
    Parameters: (P - frozen) * 2 * L * N * D

    Args:
        corpus: A text file, whose beginning gives the start.
        length: P.
        frozen: Positions at the beginning that are not trained; attention likes to rest there.
        common: Arguments of every method.
    """

    requires = (takes_keys_and_values,)

    def __init__(self, corpus: str, length: int = 256, frozen: int = 1, **common: Any) -> None:
        super().__init__(**common)
        if not 0 <= frozen < length:
            raise ValueError(f"frozen must leave some of the {length} positions to train, got {frozen}")
        if not Path(corpus).is_file():
            raise ValueError(f"corpus wants a text file, and there is none at {corpus}")
        self.corpus, self.length, self.frozen = corpus, length, frozen

    def build(self, backbone: Backbone) -> None:
        """Makes `cache`."""
        (kind, sites), *others = backbone.attentions.items()
        if others:
            raise ValueError(f"Cartridge wants a backbone of one stack, which {backbone.spec.name} is not")
        text = Path(self.corpus).read_text(encoding="utf-8")
        if (tokens := len(backbone.codec.template_ids(text))) < self.length:
            raise ValueError(f"{self.corpus} has {tokens} tokens, fewer than length={self.length}; lower it")
        first = Activations(text, start=True)(backbone, kind, self.length)
        self.cache = DeepPrompt(sites.heads, range(len(sites)), PartlyFrozen(first, self.frozen))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same keys and values for every row."""
        return SoftPrompt(kv={"self": self.cache()})


class PartlyFrozen(nn.Module):
    """Keys and values of which the first positions are not trained.

    Args:
        first: [L, 2, P, N * D] where they start.
        frozen: Positions that are not trained.
    """

    fixed: Tensor

    def __init__(self, first: Tensor, frozen: int) -> None:
        super().__init__()
        self.register_buffer("fixed", first[:, :, :frozen].clone())
        self.values = nn.Parameter(first[:, :, frozen:].clone())

    def forward(self) -> Tensor:
        """[L, 2, P, N * D]."""
        return torch.cat([self.fixed, self.values], dim=2)
