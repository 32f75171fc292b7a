"""PT-MoE (Li, Su and Collier 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary
from lightning_softprompt.prompts.low_rank import singular_factors
from lightning_softprompt.prompts.router import Router, mean_embedding


class PTMoE(SoftPromptModule):
    """A mixture of low-rank prompts with a shared factor: P = w_i A_i B for the most probable expert i.

    All experts start from the singular value decomposition of the same soft tokens. A straight-through estimator
    passes gradients from every expert to the router. Reports the penalty `balance` (load balancing) for
    `penalty_weights`.

    Paper: Li et al. 2025, arXiv 2505.09519
    Enters: soft tokens at the template's first slot, input-dependent
    Parameters: N * P * R + R * H + N * H + N

    Args:
        length: P, the number of soft tokens.
        rank: R, rank of each prompt.
        experts: N, the number of experts.
        noise: Standard deviation of the multiplicative noise of the router in training.
        init: Initial soft tokens, such as an instruction (`FromText`; default: words sampled from the vocabulary).
        common: Arguments of every method.
    """

    def __init__(
        self,
        length: int = 40,
        rank: int = 36,
        experts: int = 2,
        noise: float = 0.1,
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.rank, self.experts, self.noise = length, rank, experts, noise
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `a` [N, P, R], `b` [R, H] and the router."""
        a, b = singular_factors(self.init(backbone, self.length), self.rank)
        self.a, self.b = nn.Parameter(a.repeat(self.experts, 1, 1)), nn.Parameter(b)
        self.router = Router(backbone.hidden_size, self.experts, self.noise, bias=True)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the soft tokens of one expert for each row."""
        routing = self.router(mean_embedding(self.loaded.embed(batch.input_ids), batch))
        p = routing.probabilities
        weights = p + (p * routing.selected - p).detach()  # the value of the selected expert, the gradient of all
        tokens = torch.einsum("bn,npr,rh->bph", weights, self.a, self.b)
        return SoftPrompt(tokens=tokens, penalties={"balance": routing.balance}, logs=routing.usage)
