"""A readout selected by the kind of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, final

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import Readout
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.readouts.token_head import TokenHead


@final
class AutoReadout(Readout):
    """One readout for classes with label words, and another for classes without, such as tags: for runs with both.

    Args:
        codec: Codec of the backbone.
        classes: The classes.
        spoken: Readout for classes that all have label words.
        unspoken: Readout for classes without label words.
    """

    def __init__(
        self,
        codec: Codec,
        classes: Classes,
        spoken: Callable[[Codec, Classes], Readout] = LabelWords,
        unspoken: Callable[[Codec, Classes], Readout] = TokenHead,
    ) -> None:
        super().__init__(codec, classes)
        self.inner = (spoken if all(classes.words.values()) else unspoken)(codec, classes)

    def build(self, backbone: Backbone) -> None:
        """Creates the parameters of the selected readout."""
        self.inner.build(backbone)

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the scores of the selected readout."""
        return cast(Tensor, self.inner(lm, batch))
