"""The contract of readouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes


class Readout(nn.Module, ABC):
    """Computes class scores [B, C] or [B, W, C] from a prompted language model; their softmax is the probabilities.

    Parameters of a readout are trained and saved with the prompt. A readout with `scores_answers` has no classes and
    computes one score [B] for each answer; one with `scores_tokens` computes a value [B, U] for each token of it.

    Args:
        codec: Codec of the backbone, which tokenizes words.
        classes: The classes and their label words.
    """

    scores_answers: ClassVar[bool] = False  # whether it scores answers instead of classes
    scores_tokens: ClassVar[bool] = False  # whether it scores the tokens of answers instead of classes
    lr: float | None = None  # learning rate of its parameters; None for that of the prompt

    def __init__(self, codec: Codec, classes: Classes) -> None:
        super().__init__()
        self.codec = codec
        self.classes = classes

    def build(self, backbone: Backbone) -> None:
        """Creates the readout's parameters, if any. The backbone is loaded, so that its weights can be read."""

    @abstractmethod
    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C], [B, W, C] if each word has a class, [B] of answers, or [B, U] of their tokens."""


class WordReadout(Readout):
    """Base class of readouts that use the label words of classes.

    Raises:
        ValueError: If a class has no label words.
    """

    def __init__(self, codec: Codec, classes: Classes) -> None:
        super().__init__(codec, classes)
        if silent := [name for name, words in classes.words.items() if not words]:
            raise ValueError(
                f"{type(self).__name__} requires label words, but the classes {silent[:3]} have none (such as tags); "
                f"set --model.readout to TokenHead"
            )


def load_trained(readout: Readout, tensors: Mapping[str, Tensor]) -> None:
    """Loads the tensors of the readout that a prompt was trained with, if there are any.

    Raises:
        ValueError: If they belong to another readout.
    """
    if not tensors:
        return
    expected = readout.state_dict()
    if set(tensors) != set(expected):
        raise ValueError(
            f"the prompt was trained with a readout whose parameters are {sorted(tensors)}, but "
            f"{type(readout).__name__} has {sorted(expected)}; set --model.readout to the readout of training"
        )
    readout.load_state_dict(tensors)
