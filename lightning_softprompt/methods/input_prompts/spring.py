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
    """Soft tokens between passages and question, of which the first few serve as well as all.

    Each training step draws a number k and uses the first k soft tokens, so that one training serves every number.
    Where they stand is the template's business: `"{passages}{soft}Question: {question}..."`. Without passages in it the
    prompt is left out, and the backbone is as it was.

    Paper: Zhu et al. 2025, arXiv 2405.19670
    Enters: the first k soft tokens at the template's first slot
    Parameters: P * H

    Differences from the paper: a batch of several devices may draw another k on each; the number of passages and their
    order, which the paper draws in training too, are the data module's (`order`, `drop`).

    Args:
        length: P, soft tokens.
        candidates: The numbers k that training draws from, each as likely; None takes 1 to P.
        use: How many of the first soft tokens are used when answers are scored or given; None uses all. To try
            another number on a trained prompt, start from it: `softprompt test --init_from FILE --model.use 5`.
        init: Where they start; None draws words of the vocabulary.
        common: Arguments of every method.

    Raises:
        ValueError: If a number is not from 1 to P.
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
        if wrong := [k for k in (*self.candidates, self.use) if not 1 <= k <= length] or not self.candidates:
            raise ValueError(f"candidates and use must be numbers from 1 to length={length}, got {wrong or candidates}")

    def build(self, backbone: Backbone) -> None:
        """Makes `tokens` [P, H]."""
        self.tokens = nn.Parameter(self.init(backbone, self.length))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same first k soft tokens for every row."""
        return SoftPrompt(tokens=self.tokens[None, : self._drawn() if self.training else self.use])

    def _drawn(self) -> int:
        """From the generator that the run seeds, and that checkpoints keep: a resumed run draws the same."""
        return self.candidates[int(torch.randint(len(self.candidates), ()))]
