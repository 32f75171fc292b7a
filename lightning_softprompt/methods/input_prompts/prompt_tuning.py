"""Prompt tuning (Lester, Al-Rfou and Constant, EMNLP 2021)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary


class PromptTuning(SoftPromptModule):
    """Soft tokens before the input, trained directly; the backbone is frozen.

    Paper: Lester et al. 2021, arXiv 2104.08691
    Enters: soft tokens at the template's first slot, or a block of them at each
    Parameters: P * H

    Differences from the paper: slots anywhere in the template; any family of backbones, not only T5 (where soft tokens
    are in the encoder's input, as in the paper); random initial values have the scale of the backbone's embeddings;
    AdamW by default, not Adafactor.

    Args:
        length: P, the number of soft tokens at the first slot, or a list with the number at each `{soft}` of the
            template, in order.
        init: Initial soft tokens (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.

    Raises:
        ValueError: If a slot has no soft token.
    """

    def __init__(self, length: int | list[int] = 20, init: Init | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.blocks = (length,) if isinstance(length, int) else tuple(length)
        if min(self.blocks, default=0) < 1:
            raise ValueError(f"length must be at least 1, got {length}; use NoPrompt for the backbone without a prompt")
        self.length, self.init = sum(self.blocks), init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H]."""
        self.tokens = nn.Parameter(self.init(backbone, self.length))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every row."""
        return SoftPrompt(tokens=self.tokens[None], blocks=self.blocks)
