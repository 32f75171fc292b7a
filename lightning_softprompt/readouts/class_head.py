"""Class scores from a head that is trained with the prompt."""

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
    """A linear map of the backbone's last states to class scores (Liu et al. 2022, arXiv 2110.07602, section 3.3).

    It reads no words, so any backbone will do, one without a language-modelling head too. The answer's place holds what
    it holds in a question.

    Args:
        codec: The backbone's.
        classes: The classes.
        pool: Which states: the `first` token's, as of BERT's [CLS], the `last` one's, or the `mean` over the row.
    """

    def __init__(self, codec: Codec, classes: Classes, pool: Pool = "mean") -> None:
        super().__init__(codec, classes)
        self.pool = pool

    def build(self, backbone: Backbone) -> None:
        """Makes the map [C, H], started at random."""
        self.linear = nn.Linear(backbone.hidden_size, len(self.classes))

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Scores [B, C] in float32."""
        questions = self.codec.questions(batch)
        states = lm.backbone.hidden_states(questions, lm.prompt(questions))
        states = states.to(self.linear.weight.dtype)
        return self.linear(pool_states(states, questions.source, self.pool))  # type: ignore[no-any-return]
