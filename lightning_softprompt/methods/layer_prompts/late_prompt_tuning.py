"""Late prompt tuning (Liu et al., Findings of EMNLP 2022)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_max_pool1d

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.requirements import takes_late_tokens
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import rms
from lightning_softprompt.prompts.pooling import Pool, pool_states


class LatePromptTuning(SoftPromptModule):
    """Soft tokens that enter at a middle layer, free or generated from the row's states there.

    Nothing below that layer is back-propagated through.

    Paper: Liu et al. 2022, arXiv 2210.11292
    Enters: hidden states before layer k; in decoders before all text, in encoders at the template's first slot
    Parameters: free P * H; state H * M + M + (M + 1) * P * H; average and maximum 2 * H * M + M + H

    Differences from the paper: in a decoder, late tokens stand before the whole row and do not hear it, unless they are
    generated from it; encoder-decoders are left out.

    Args:
        length: P.
        layer: k, counted from 0; None takes the middle one.
        generator: `free` trains the soft tokens themselves; `state` makes them of one state of the row (NPG); `average`
            and `maximum` of the row's states, pooled to P of them (APPG, MPPG).
        bottleneck: M, width of the generator's middle.
        pool: Which state `state` is made of: the `first` token's, as of BERT's [CLS], the `last` one's, or the `mean`.
        common: Arguments of every method.
    """

    requires = (takes_late_tokens,)
    default_rate = 1e-4  # the best of three on SST-2, benchmarks/LOG.md; the paper's is 1e-3

    def __init__(
        self,
        length: int = 5,
        layer: int | None = None,
        generator: Literal["free", "state", "average", "maximum"] = "state",
        bottleneck: int = 128,
        pool: Pool = "mean",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.layer, self.generator, self.bottleneck, self.pool = length, layer, generator, bottleneck, pool

    def build(self, backbone: Backbone) -> None:
        """Makes `tokens` [P, H], or `down` and `up`."""
        self.at = backbone.depth // 2 if self.layer is None else self.layer
        if not 0 <= self.at < backbone.depth:
            raise ValueError(f"layer must be from 0 to {backbone.depth - 1}, got {self.at}")
        width = backbone.hidden_size
        if self.generator == "free":
            self.tokens = nn.Parameter(torch.randn(self.length, width) * rms(backbone))
            return
        self.down = nn.Linear(width, self.bottleneck)
        self.up = nn.Linear(self.bottleneck, width * (self.length if self.generator == "state" else 1))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Soft tokens for layer k, the same for every row where they are free."""
        tokens = self.tokens[None] if self.generator == "free" else self._generated(batch)
        return SoftPrompt(hidden={self.at: tokens})

    def _generated(self, batch: Batch) -> Tensor:
        questions = self.loaded.codec.questions(batch)
        states = self.loaded.hidden_states(questions, layer=self.at).to(self.up.weight.dtype)
        if self.generator == "state":
            made = self.up(self.down(pool_states(states, questions.source, self.pool)).relu())
            return made.unflatten(1, (self.length, -1))  # type: ignore[no-any-return]
        shrink = adaptive_avg_pool1d if self.generator == "average" else adaptive_max_pool1d
        lowered = [self.down(row[seen]) for row, seen in zip(states, questions.source, strict=True)]  # each [T, M]
        return self.up(torch.stack([shrink(row.T, self.length).T for row in lowered]).relu())  # type: ignore[no-any-return]
