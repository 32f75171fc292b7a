"""SPRING (Zhu et al., AAAI 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary


class Spring(SoftPromptModule):
    """Soft tokens between passages and question, of which any number of the first ones can be used.

    Each training step draws a number k and uses the first k soft tokens, so that one training covers every number. The
    template sets their position: `"{passages}{soft}Question: {question}..."`. A template without `{soft}` uses the
    backbone without a prompt.

    Paper: Zhu et al. 2025, arXiv 2405.19670
    Enters: the first k soft tokens at the template's first slot
    Parameters: P * H

    Differences from the paper: each device may draw another k for its part of a batch; the number of passages and their
    order, which the paper also draws in training, are options of the data module (`order`, `drop`).

    Args:
        length: P, the number of soft tokens.
        candidates: The numbers k that training draws from uniformly (default: 1 to P).
        use: Number of soft tokens used in evaluation and prediction (default: all). To test another number with a
            trained prompt: `softprompt test --init_from FILE --model.use 5`.
        init: Initial soft tokens (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.

    Raises:
        ValueError: If a number is not between 1 and P.
    """

    def __init__(
        self,
        length: int = 50,
        candidates: list[int] | None = None,
        use: int | None = None,
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.init = length, init or SampleVocabulary()
        self.candidates = list(range(1, length + 1)) if candidates is None else list(candidates)
        self.use = length if use is None else use
        wrong = [k for k in (*self.candidates, self.use) if not 1 <= k <= length]
        if wrong or not self.candidates:
            raise ValueError(f"candidates and use must be numbers from 1 to length={length}, got {wrong or candidates}")

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H]."""
        self.tokens = nn.Parameter(self.init(backbone, self.length))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same first k soft tokens for every row."""
        length = self._draw_length() if self.training else self.use
        return SoftPrompt(tokens=self.tokens[None, :length])

    def _draw_length(self) -> int:
        """Draws k from the global generator, whose state checkpoints store: a resumed run draws the same numbers."""
        return self.candidates[int(torch.randint(len(self.candidates), ()))]
