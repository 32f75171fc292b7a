"""Class scores from a trained linear head."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.prompts.pooling import Pool, pool_states
from lightning_softprompt.readouts.base import Readout


@final
class ClassHead(Readout):
    """A linear map of the backbone's final states to class scores (Liu et al. 2022, arXiv 2110.07602, section 3.3).

    It uses no label words, so that it works with any backbone, also without a language-modelling head. The position of
    the answer contains the same tokens as in prediction.

    Args:
        codec: Codec of the backbone.
        classes: The classes.
        pool: State of the `first` token, such as BERT's [CLS], of the `last` one, or the `mean` over the row.
    """

    def __init__(self, codec: Codec, classes: Classes, pool: Pool = "mean") -> None:
        super().__init__(codec, classes)
        self.pool = pool

    def build(self, backbone: Backbone) -> None:
        """Creates the map [C, H], initialized at random."""
        self.linear = nn.Linear(backbone.hidden_size, len(self.classes))

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] in float32."""
        questions = self.codec.without_answers(batch)
        states = lm.backbone.hidden_states(questions, lm.prompt(questions))
        states = states.to(self.linear.weight.dtype)
        return self.linear(pool_states(states, questions.source, self.pool))  # type: ignore[no-any-return]
