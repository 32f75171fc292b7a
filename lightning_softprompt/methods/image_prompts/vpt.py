"""Visual prompt tuning (Jia et al., ECCV 2022)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.contrastive.base import contrastive, reads_images
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class VisualPromptTuning(SoftPromptModule):
    """Soft tokens in the image tower, at its input (shallow) or at the input of each of its first layers (deep).

    Before a layer with soft tokens of its own, the states of the previous ones are replaced. The classes are scored by
    their texts, or by a trained head with the readout `ImageHead`, as in the paper.

    Paper: Jia et al. 2022, arXiv 2203.12119
    Enters: the image tower, after the patches
    Parameters: P * G, or J * P * G, with G the width of the image tower

    Differences from the paper: a CLIP or SigLIP image tower; soft tokens follow the patches, where they have the same
    effect as after the first token, since they have no positions; no dropout.

    Args:
        length: P, the number of soft tokens.
        layers: J, the number of layers with soft tokens of their own; 1 is the shallow variant, and None all layers.
        common: Arguments of every method.
    """

    requires = (reads_images,)
    default_rate = 0.0025

    def __init__(self, length: int = 8, layers: int | None = 1, **common: Any) -> None:
        super().__init__(**common)
        if length < 1 or (layers is not None and layers < 1):
            raise ValueError(f"length and layers must be at least 1, got {length} and {layers}")
        self.length, self.layers = length, layers

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [J, P, G], uniform in the interval of Xavier for a patch and a state.

        Raises:
            ValueError: If the image tower has fewer layers.
        """
        images = contrastive(backbone)
        count = images.image_depth if self.layers is None else self.layers
        if count > images.image_depth:
            raise ValueError(f"layers is {count}, but the image tower has {images.image_depth}")
        values_of_patch = images.image_size[0] * images.patch_size**2
        bound = math.sqrt(6 / (values_of_patch + images.image_hidden_size))
        tokens = torch.empty(count, self.length, images.image_hidden_size)
        self.tokens = nn.Parameter(tokens.uniform_(-bound, bound))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every image."""
        first, *later = self.tokens.unsqueeze(1)  # [1, P, G] each
        return SoftPrompt(image=SoftPrompt(tokens=first, deep=dict(enumerate(later, 1))))
