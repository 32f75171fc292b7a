"""CoOp (Zhou et al., IJCV 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.contrastive.base import reads_images
from lightning_softprompt.core.types import Batch, Classes, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, Normal


class CoOp(SoftPromptModule):
    """Soft tokens in the texts of classes, to which images are compared: one context for all classes, or one for each.

    The template sets their position: `"{soft}{target}."` before the class, `"{target}{soft}."` after it, and
    `"{soft}{target}{soft}."` with `length: [8, 8]` on both sides. A unified context also describes classes that it was
    not trained on.

    Paper: Zhou et al. 2022, arXiv 2109.01134
    Enters: soft tokens at the slots of the texts of classes
    Parameters: P * H, or C * P * H

    Differences from the paper: texts are not padded to 77 tokens; products in the precision of the backbone.

    Args:
        length: P, the number of soft tokens at the first slot, or a list with the number at each `{soft}` of the
            template, in order.
        class_specific: Whether each class has soft tokens of its own.
        init: Initial soft tokens (default: a normal distribution with the standard deviation 0.02).
        common: Arguments of every method.

    Raises:
        ValueError: If a slot has no soft token, or soft tokens of each class are requested without classes.
    """

    requires = (reads_images,)
    default_rate = 0.002

    def __init__(
        self,
        length: int | list[int] = 16,
        class_specific: bool = False,
        init: Init | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.blocks = (length,) if isinstance(length, int) else tuple(length)
        if min(self.blocks, default=0) < 1:
            raise ValueError(f"length must be at least 1, got {length}; use NoPrompt for the backbone without a prompt")
        self.length, self.class_specific, self.init = sum(self.blocks), class_specific, init or Normal(0.02)

    def build(self, backbone: Backbone) -> None:
        """Creates `tokens` [P, H], or [C, P, H]."""
        if not self.class_specific:
            self.tokens = nn.Parameter(self.init(backbone, self.length))
            return
        count = len(self._require_classes())
        self.tokens = nn.Parameter(torch.stack([self.init(backbone, self.length) for _ in range(count)]))

    def _require_classes(self) -> Classes:
        if self.classes is None:
            raise ValueError("class_specific requires a task with classes, such as ImageClassificationDataModule")
        return self.classes

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same soft tokens for every text, or those of its class; for images, those of all classes."""
        tokens = self.tokens if self.class_specific else self.tokens[None]
        if self.class_specific and batch.class_ids is not None:
            tokens = tokens[batch.class_ids]
        return SoftPrompt(tokens=tokens, blocks=self.blocks)
