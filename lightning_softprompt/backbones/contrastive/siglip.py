"""SigLIP. The text tower is bidirectional; it reads texts padded to its window, and pools the last position."""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lightning_softprompt.backbones.contrastive.base import ContrastiveBackbone
from lightning_softprompt.backbones.insertion.layers import states_before
from lightning_softprompt.core.types import Batch, SoftPrompt


@final
class SigLIPBackbone(ContrastiveBackbone):
    """A frozen SigLIP model.

    Padding is a part of a text here: the model was trained on texts that are padded to its window, without a mask. Its
    logits include the learned bias, which does not change the probabilities of classes.
    """

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whether the model is SigLIP."""
        return bool(config.model_type == "siglip")

    def _pooled_text(self, batch: Batch, prompt: SoftPrompt) -> Tensor:
        spliced = self.splice(batch, prompt)
        size, length = int(self.stack.config.max_position_embeddings), spliced.mask.shape[1]
        padding = self.embed(torch.full((1, 1), self.codec.pad_id, device=spliced.mask.device))
        rows = padding.expand(len(batch), size, -1).clone()
        rows[:, :length] = torch.where(spliced.mask[..., None], spliced.embeds, rows[:, :length])
        soft_tokens = 0 if prompt.tokens is None else prompt.tokens.shape[1]
        is_soft = (spliced.order < soft_tokens) & spliced.mask
        origin = torch.full(rows.shape[:2], -1, device=rows.device)
        origin[:, :length] = spliced.order.where(is_soft, -1)
        numbers = torch.arange(len(batch), device=rows.device)[:, None].expand_as(origin)
        with self.replace_soft_states(prompt.deep, origin, numbers), self.inject(prompt):
            states = states_before(self.stack, None, lambda: self.entry.run(self.stack, rows))
        head = cast(nn.Module, self.stack.head)
        return cast(Tensor, head(states[:, -1]))

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """See `ContrastiveBackbone.scores`."""
        logits = super().scores(images, texts)
        return logits + cast(Tensor, self.model.logit_bias).to(logits)
