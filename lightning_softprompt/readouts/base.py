"""The contract of readouts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes


class Readout(nn.Module, ABC):
    """Reads class scores off a prompted language model, [B, C] or [B, W, C]; their softmax are the probabilities.

    Parameters of a readout are trained and saved with the prompt.

    Args:
        codec: The backbone's, which turns words into tokens.
        classes: How the classes are spoken.
    """

    def __init__(self, codec: Codec, classes: Classes) -> None:
        super().__init__()
        self.codec = codec
        self.classes = classes

    def build(self, backbone: Backbone) -> None:
        """Makes the readout's parameters, where it has any. The backbone's weights are there to be read."""

    @abstractmethod
    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Scores [B, C], or [B, W, C] where each word has a class."""


class WordReadout(Readout):
    """A readout of the classes' words, which others may build on.

    Raises:
        ValueError: If classes are not spoken.
    """

    def __init__(self, codec: Codec, classes: Classes) -> None:
        super().__init__(codec, classes)
        if silent := [name for name, words in classes.words.items() if not words]:
            raise ValueError(
                f"{type(self).__name__} reads the words of classes, and {silent[:3]} have none, as tags of words do; "
                f"set --model.readout to TokenHead"
            )
