"""MaPLe (Khattak et al., CVPR 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.contrastive.base import contrastive, reads_images
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import FromText, Init, Normal


class MaPLe(SoftPromptModule):
    """Soft tokens in the first layers of both towers; those of the image tower are linear maps of those of the texts.

    Before each of the first J layers, the states of the soft tokens are replaced by soft tokens of this layer. Later
    layers process them further.

    Paper: Khattak et al. 2023, arXiv 2210.03117
    Enters: soft tokens at the slots of the texts of classes; the image tower, after the patches
    Parameters: J * (P * H + H * G + G), with G the width of the image tower

    Differences from the paper: texts are not padded to 77 tokens; products in the precision of the backbone.

    Args:
        length: P, the number of soft tokens of each tower.
        layers: J, the number of layers with soft tokens of their own; at most the layers of the shallower tower.
        init: Initial soft tokens of the first layer (default: the embeddings of `a photo of a`); those of later layers
            have a normal distribution with the standard deviation 0.02.
        common: Arguments of every method.
    """

    requires = (reads_images,)
    default_rate = 0.0035

    def __init__(self, length: int = 2, layers: int = 9, init: Init | None = None, **common: Any) -> None:
        super().__init__(**common)
        if length < 1 or layers < 1:
            raise ValueError(f"length and layers must be at least 1, got {length} and {layers}")
        self.length, self.layers, self.init = length, layers, init or FromText("a photo of a")

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [J, P, H], and `maps`, a linear map [H] -> [G] for each layer.

        Raises:
            ValueError: If a tower has fewer layers.
        """
        images = contrastive(backbone)
        depth = min(images.depth, images.image_depth)
        if self.layers > depth:
            raise ValueError(f"layers is {self.layers}, but the shallower tower of the backbone has {depth}")
        later = [Normal(0.02)(backbone, self.length) for _ in range(self.layers - 1)]
        self.tokens = nn.Parameter(torch.stack([self.init(backbone, self.length), *later]))
        sizes = backbone.hidden_size, images.image_hidden_size
        self.maps = nn.ModuleList(nn.Linear(*sizes) for _ in range(self.layers))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every text, and for every image."""
        first, *later = self.tokens.unsqueeze(1)  # [1, P, H] each
        image_first, *image_later = [to_image(tokens) for to_image, tokens in zip(self.maps, self.tokens, strict=True)]
        image_deep = {layer: tokens[None] for layer, tokens in enumerate(image_later, 1)}
        image = SoftPrompt(tokens=image_first[None], deep=image_deep)
        return SoftPrompt(tokens=first, deep=dict(enumerate(later, 1)), image=image)
