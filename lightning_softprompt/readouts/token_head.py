"""Class scores of each word from a trained linear head."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.readouts.base import Readout


@final
class TokenHead(Readout):
    """A linear map of each word's final state to class scores (Liu et al. 2022, arXiv 2110.07602, section 3.3).

    The state of a word is that of its first token. In an encoder it attends to the whole row; in a causal backbone only
    to the preceding tokens, not to the rest of the word or the following text.

    Args:
        codec: Codec of the backbone.
        classes: The classes.
    """

    def build(self, backbone: Backbone) -> None:
        """Creates the map [C, H], initialized at random."""
        self.linear = nn.Linear(backbone.hidden_size, len(self.classes))

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, W, C] in float32; arbitrary if a row has no such word, or no token of it.

        Raises:
            ValueError: If the words of the rows have no classes.
        """
        if batch.words is None:
            raise ValueError(
                "TokenHead scores each word, but only whole rows have classes; use --model.readout ClassHead"
            )
        states = lm.backbone.hidden_states(batch, lm.prompt(batch))  # [B, T, H]
        positions = batch.words.clamp(min=0)[..., None]  # [B, W, 1], of first tokens
        of_words = states.gather(1, positions.expand(-1, -1, states.shape[2]))  # [B, W, H]
        return self.linear(of_words.to(self.linear.weight.dtype))  # type: ignore[no-any-return]
