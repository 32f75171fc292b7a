"""The contract of readouts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.codec import Codec
from lightning_softprompt.lm import PromptedLM
from lightning_softprompt.types import Batch, Classes


class Readout(nn.Module, ABC):
    """Reads class scores [B, C] off a prompted language model; the class probabilities are their softmax.

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
        """Scores [B, C]."""


class WordReadout(Readout):
    """A readout of the classes' words, which others may build on."""
