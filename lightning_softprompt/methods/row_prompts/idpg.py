"""IDPG (Wu et al., NAACL 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary
from lightning_softprompt.prompts.networks import HypercomplexLinear
from lightning_softprompt.prompts.pooling import Pool, pool_states


class IDPG(SoftPromptModule):
    """Soft tokens generated from the frozen backbone's representation of the row: W_2 GELU(W_1 h(x)) + b_2.

    Costs a second forward pass, over the row without its answer and without gradient.

    Paper: Wu et al. 2022, arXiv 2204.04497
    Enters: soft tokens at the template's first slot, input-dependent
    Parameters: H * M + M + (M + 1) * P * H

    Differences from the paper: b_2 starts from embeddings of words; any family of backbones; a choice of states.

    Args:
        length: P, the number of soft tokens.
        bottleneck: M, hidden width of the generator.
        hypercomplex: n, if both maps are sums of n Kronecker products (PHM), with fewer parameters; it must divide H, M
            and P * H. None uses full matrices.
        pool: The final state h: of the `first` token, such as BERT's [CLS], of the `last` one, or the `mean`.
        init: Initial soft tokens, stored in b_2 (default: embeddings of words sampled from the vocabulary).
        common: Arguments of every method.
    """

    default_rate = 1e-3  # the best of three rates on SST-2, see benchmarks/LOG.md; the paper uses 5e-4

    def __init__(
        self,
        length: int = 5,
        bottleneck: int = 16,
        hypercomplex: int | None = None,
        pool: Pool = "mean",
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.bottleneck, self.hypercomplex, self.pool = length, bottleneck, hypercomplex, pool
        self.init = init or SampleVocabulary()

    def build(self, backbone: Backbone) -> None:
        """Creates `down` and `up`."""
        width = backbone.hidden_size
        self.down = self._linear(width, self.bottleneck)
        self.up = self._linear(self.bottleneck, self.length * width)
        with torch.no_grad():
            self.up.bias.copy_(self.init(backbone, self.length).flatten())

    def _linear(self, inner: int, outer: int) -> Any:
        if self.hypercomplex is None:
            return nn.Linear(inner, outer)
        return HypercomplexLinear(inner, outer, self.hypercomplex)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the soft tokens of each row."""
        questions = self.loaded.codec.without_answers(batch)
        with torch.no_grad():
            states = self.loaded.hidden_states(questions).to(self.up.bias.dtype)
        features = pool_states(states, questions.source, self.pool)  # [B, H]
        tokens = self.up(nn.functional.gelu(self.down(features)))
        return SoftPrompt(tokens=tokens.unflatten(1, (self.length, -1)))
