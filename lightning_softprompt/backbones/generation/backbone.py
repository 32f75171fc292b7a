"""What generation requires of a backbone. The backbones import generation, so generation names these protocols."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from lightning_softprompt.backbones.execution.context_cache import PrefilledCache
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt


class GeneratingBackbone(Protocol):
    """A backbone that generates text; `Backbone` describes its members."""

    model: PreTrainedModel
    codec: Codec
    spec: BackboneSpec

    @property
    def stack(self) -> PreTrainedModel:
        """The part that reads the input."""

    @property
    def word_embeddings(self) -> Tensor:
        """The frozen table [V, H]."""

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H] as the first layer takes them."""

    def inject(self, prompt: SoftPrompt | None) -> AbstractContextManager[None]:
        """Gives the attentions the prompt's keys and values for what runs inside."""


class DecoderBackbone(GeneratingBackbone, Protocol):
    """A decoder-only backbone, which keeps the keys and values of prompts that rows share."""

    prompts: PrefilledCache


class EncoderDecoderBackbone(GeneratingBackbone, Protocol):
    """An encoder-decoder backbone."""

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens that the decoder begins with."""
