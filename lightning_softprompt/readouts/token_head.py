"""Scores of each word's class from a head that is trained with the prompt."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.readouts.base import Readout


@final
class TokenHead(Readout):
    """A linear map of each word's last state to scores of its class (Liu et al. 2022, arXiv 2110.07602, section 3.3).

    A word's state is that of the first of its tokens. An encoder has read the whole row by then; a causal backbone only
    what stands before, neither the rest of the word nor what follows it.

    Args:
        codec: The backbone's.
        classes: The classes.
    """

    def build(self, backbone: Backbone) -> None:
        """Makes the map [C, H], started at random."""
        self.linear = nn.Linear(backbone.hidden_size, len(self.classes))

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Scores [B, W, C] in float32; anything where a row has no such word, or no token of it.

        Raises:
            ValueError: If words of the rows have no classes.
        """
        if batch.words is None:
            raise ValueError("TokenHead scores each word, but only whole rows have classes here; take ClassHead")
        states = lm.backbone.hidden_states(batch, lm.prompt(batch))  # [B, T, H]
        first = batch.words.clamp(min=0)[..., None].expand(-1, -1, states.shape[2])
        return self.linear(states.gather(1, first).to(self.linear.weight.dtype))  # type: ignore[no-any-return]
