"""Class scores from a trained linear map of image features."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.contrastive.base import contrastive
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import Readout


@final
class ImageHead(Readout):
    """A linear map of the features of an image to class scores, which does not use the texts of classes.

    With `NoPrompt`, it is the linear probe of CLIP (Radford et al. 2021, arXiv 2103.00020, section 3.2). With a prompt
    in the image tower, it is the head of visual prompt tuning. It cannot score classes that it was not trained on.

    Args:
        codec: Codec of the backbone.
        classes: The classes.
        lr: Learning rate of the map (default: that of the prompt).
    """

    def __init__(self, codec: Codec, classes: Classes, lr: float | None = None) -> None:
        super().__init__(codec, classes)
        self.lr = lr

    def build(self, backbone: Backbone) -> None:
        """Creates the map [C, F], initialized at random."""
        self.linear = nn.Linear(contrastive(backbone).feature_size, len(self.classes))

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] in float32."""
        features = contrastive(lm.backbone).image_features(batch, lm.prompt(batch).image)
        return self.linear(features.to(self.linear.weight.dtype))  # type: ignore[no-any-return]
