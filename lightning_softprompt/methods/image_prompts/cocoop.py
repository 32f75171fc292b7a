"""CoCoOp (Zhou et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.contrastive.base import contrastive, reads_images
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import FromText, Init


class CoCoOp(SoftPromptModule):
    """Soft tokens in the texts of classes that depend on the image: v_m(x) = v_m + h(f(x)), with a network h.

    Each text runs once for each image of the batch, so batches are small; the paper uses 1 image.

    Paper: Zhou et al. 2022, arXiv 2203.05557
    Enters: soft tokens at the slots of the texts of classes, input-dependent
    Parameters: P * H + F * M + M + M * H + H, with M = F / 16 hidden units

    Differences from the paper: texts are not padded to 77 tokens; products in the precision of the backbone.

    Args:
        length: P, the number of soft tokens.
        reduction: F / M, by which the hidden layer of the network is narrower than the features of images.
        init: Initial soft tokens (default: the embeddings of `a photo of a`).
        common: Arguments of every method.
    """

    requires = (reads_images,)
    default_rate = 0.002

    def __init__(self, length: int = 4, reduction: int = 16, init: Init | None = None, **common: Any) -> None:
        super().__init__(**common)
        if length < 1 or reduction < 1:
            raise ValueError(f"length and reduction must be at least 1, got {length} and {reduction}")
        self.length, self.reduction, self.init = length, reduction, init or FromText("a photo of a")

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H] and `network` [F] -> [H]."""
        size = contrastive(backbone).feature_size
        inner = max(1, size // self.reduction)
        self.tokens = nn.Parameter(self.init(backbone, self.length))
        self.network = nn.Sequential(nn.Linear(size, inner), nn.ReLU(), nn.Linear(inner, backbone.hidden_size))

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the soft tokens of each image, for images or for texts that are compared with one."""
        features = batch.image_features
        if features is None:
            features = contrastive(self.loaded).image_features(batch)
        shift = self.network(features.to(self.tokens.dtype))  # [B, H]
        return SoftPrompt(tokens=self.tokens + shift[:, None], depends_on_image=True)
