"""P-tuning (Liu et al. 2021, "GPT understands, too")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, Normal
from lightning_softprompt.prompts.networks import Recurrent, perceptron


class PTuning(SoftPromptModule):
    """Soft tokens anywhere in the template, computed by one small network over all of them: h = g(Z).

    Anchor words are plain text in the template. Each `{soft}` of the template holds one of `blocks`.

    Paper: Liu et al. 2021, arXiv 2103.10385
    Enters: soft tokens at the template's slots
    Parameters: P * H + 14 * H^2 + 18 * H of the LSTM with its MLP; P * H + 3 * H^2 + 3 * H of the MLP

    Differences from the paper: the backbone stays frozen, as in the paper's experiments on LAMA.

    Args:
        blocks: Number of soft tokens at each slot, in order.
        encoder: `lstm` is a bidirectional LSTM with two layers of width H / 2, then H -> H -> H with ReLU; `wide_lstm`
            has width H and 2 H -> H -> H, as in the paper's experiments on SuperGLUE; `mlp` is H -> H -> H -> H.
        init: Initial Z; None draws from a normal distribution with the scale of the backbone's word embeddings.
        common: Arguments of every method.
    """

    default_rate = 3e-4  # the best of three rates on SST-2, see benchmarks/LOG.md

    def __init__(
        self,
        blocks: Sequence[int] = (10,),
        encoder: Literal["lstm", "wide_lstm", "mlp"] = "lstm",
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if min(blocks, default=0) < 1:
            raise ValueError(f"blocks requires at least one soft token for each slot, got {list(blocks)}")
        self.blocks, self.encoder, self.init = tuple(blocks), encoder, init or Normal()

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H] and the network."""
        self.tokens = nn.Parameter(self.init(backbone, sum(self.blocks)))
        self.network = ENCODERS[self.encoder](backbone.hidden_size)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every row."""
        return SoftPrompt(tokens=self.network(self.tokens)[None], blocks=self.blocks)


ENCODERS = {
    "lstm": lambda h: Recurrent(h, h // 2, 2, perceptron([h, h, h])),
    "wide_lstm": lambda h: Recurrent(h, h, 2, perceptron([2 * h, h, h])),
    "mlp": lambda h: perceptron([h, h, h, h]),
}
