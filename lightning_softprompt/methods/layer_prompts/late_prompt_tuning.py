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
    """Soft tokens inserted at a middle layer, trained directly or generated from the row's states there.

    Gradients are not propagated below that layer.

    Paper: Liu et al. 2022, arXiv 2210.11292
    Enters: hidden states before layer k; in decoders before all text, in encoders at the template's first slot
    Parameters: free P * H; state H * M + M + (M + 1) * P * H; average and maximum 2 * H * M + M + H

    Differences from the paper: in a decoder, late tokens precede the whole row and cannot attend to it, unless they are
    generated from it; encoder-decoders are not supported.

    Args:
        length: P, the number of soft tokens.
        layer: k, counted from 0 (default: the middle layer).
        generator: `free` trains the soft tokens directly; `state` generates them from one state of the row (NPG);
            `average` and `maximum` from the row's states, pooled to P states (APPG, MPPG).
        bottleneck: M, hidden width of the generator.
        pool: Input of the generator `state`: the state of the `first` token, such as BERT's [CLS], of the `last` one,
            or the `mean`.
        common: Arguments of every method.
    """

    requires = (takes_late_tokens,)
    default_rate = 1e-4  # the best of three rates on SST-2, see benchmarks/LOG.md; the paper uses 1e-3

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
        self.length, self.layer = length, layer
        self.generator, self.bottleneck, self.pool = generator, bottleneck, pool

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H], or `down` and `up`."""
        self.at = backbone.depth // 2 if self.layer is None else self.layer
        if not 0 <= self.at < backbone.depth:
            raise ValueError(f"layer must be between 0 and {backbone.depth - 1}, got {self.at}")
        width = backbone.hidden_size
        if self.generator == "free":
            self.tokens = nn.Parameter(torch.randn(self.length, width) * rms(backbone))
            return
        self.down = nn.Linear(width, self.bottleneck)
        self.up = nn.Linear(self.bottleneck, width * (self.length if self.generator == "state" else 1))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns soft tokens for layer k; `free` ones are the same for every row."""
        tokens = self.tokens[None] if self.generator == "free" else self._generate(batch)
        return SoftPrompt(hidden={self.at: tokens})

    def _generate(self, batch: Batch) -> Tensor:
        questions = self.loaded.codec.without_answers(batch)
        states = self.loaded.hidden_states(questions, layer=self.at).to(self.up.weight.dtype)
        if self.generator == "state":
            pooled = pool_states(states, questions.source, self.pool)  # [B, H]
            tokens = self.up(self.down(pooled).relu())
            return tokens.unflatten(1, (self.length, -1))  # type: ignore[no-any-return]
        shrink = adaptive_avg_pool1d if self.generator == "average" else adaptive_max_pool1d
        pooled_rows = []
        for row, mask in zip(states, questions.source, strict=True):
            bottleneck = self.down(row[mask])  # [T, M]
            pooled_rows.append(shrink(bottleneck.T, self.length).T)
        return self.up(torch.stack(pooled_rows).relu())  # type: ignore[no-any-return]
