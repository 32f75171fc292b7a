"""A readout for each kind of classes."""

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
    """One readout where classes are spoken, and another where they are not, as tags of words: for runs with both.

    Args:
        codec: The backbone's.
        classes: The classes.
        spoken: Where each class has a word.
        unspoken: Where they have none.
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
        """Makes the parameters of the one that is taken."""
        self.inner.build(backbone)

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Its scores."""
        return cast(Tensor, self.inner(lm, batch))
