"""SMoP (Choi et al., EMNLP 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary
from lightning_softprompt.prompts.router import Router, mean_embedding


class SMoP(SoftPromptModule):
    """A sparse mixture of short prompts: a router selects one of N for each row, scaled by its probability.

    Reports the penalty `balance` (load balancing) for `penalty_weights`; the paper does not use it.

    Paper: Choi et al. 2023, EMNLP, "SMoP: Towards Efficient and Effective Prompt Tuning with Sparse Mixture-of-Prompts"
    Enters: soft tokens at the template's first slot, input-dependent
    Parameters: N * P * H + N * H

    Args:
        length: P, the number of soft tokens of each expert.
        experts: N, the number of experts.
        noise: Standard deviation of the multiplicative noise of the router in training.
        init: Initial soft tokens (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.
    """

    def __init__(
        self, length: int = 5, experts: int = 4, noise: float = 1.0, init: Init | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        self.length, self.experts, self.noise = length, experts, noise
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [N, P, H] and the router."""
        tokens = [self.init(backbone, self.length) for _ in range(self.experts)]
        self.tokens = nn.Parameter(torch.stack(tokens))
        self.router = Router(backbone.hidden_size, self.experts, self.noise, bias=False)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the soft tokens of one expert for each row."""
        routing = self.router(mean_embedding(self.loaded.embed(batch.input_ids), batch))
        scale = (routing.probabilities * routing.selected).sum(1)  # [B]
        tokens = self.tokens[routing.chosen] * scale[:, None, None]
        return SoftPrompt(tokens=tokens, penalties={"balance": routing.balance}, logs=routing.usage)
