"""`FrozenModel`: the weights of a backbone, which never change, their fingerprint, and the embeddings of tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_softprompt.backbones.fingerprint import (
    WeightFiles,
    digest_sample,
    fingerprint,
    model_digest,
    tokenizer_digest,
    versions,
)
from lightning_softprompt.backbones.insertion.layers import compile_layers, layers_of, recompute_layers
from lightning_softprompt.backbones.insertion.positions import max_positions
from lightning_softprompt.backbones.kernels.gated_mlp import use_lean_gated_mlp
from lightning_softprompt.backbones.kernels.prepacked_linear import prepack
from lightning_softprompt.backbones.kernels.quantized_linear import use_exact_dequant_linear
from lightning_softprompt.backbones.kernels.rms_norm import use_frozen_rms_norm
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec


class LayerGather(Protocol):
    """Gathers the layers of a backbone that is sharded over processes."""

    def register_hooks(self) -> None:
        """Gathers each layer before it runs, from now on."""

    def drain(self) -> None:
        """Joins the gathers of other processes until none of them runs a layer."""


class FrozenModel(nn.Module):
    """A transformers model that is always in evaluation mode and never trainable.

    Args:
        model: The transformers model.
        codec: Converts rows to tokens and back.
        spec: The specification it was loaded from.
    """

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.codec = codec
        self.spec = spec
        self.learned_positions: int | None = None
        self.pinned_fingerprint: str | None = None  # the fingerprint before weights change or are sharded
        self._pinned_sampled_fingerprint: str | None = None
        self.files: WeightFiles | None = None  # the files that the weights were loaded from
        self.layer_gather: LayerGather | None = None  # if the layers are sharded over processes
        self.train()
        if not spec.compiled:  # the compiler fuses these operations itself
            use_frozen_rms_norm(model)
            use_lean_gated_mlp(model)
        self.quantized = {} if spec.quantization is None else use_exact_dequant_linear(model, spec.quantization)
        self.prepacked = not self.quantized and prepack(model, spec.linear_backend, self.hidden_size)
        if spec.compiled:
            compile_layers(model)
        if spec.checkpointing:
            recompute_layers(model)
        self._loaded_versions = versions(model)
        self._weights_hash: tuple[tuple[int, ...], str] | None = None  # the versions of the weights and their digest

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, since dropout in a frozen model would only add noise to the prompt's gradient."""
        return super().train(False)

    @property
    def stack(self) -> PreTrainedModel:
        """The part that reads the input."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def depth(self) -> int:
        """Layers of the part that reads the input."""
        parent, name = layers_of(self.stack)
        return len(getattr(parent, name))

    @property
    def hidden_size(self) -> int:
        """H, the size of the input embeddings."""
        return self.word_embeddings.shape[1]

    @property
    def word_embeddings(self) -> Tensor:
        """The frozen embedding table [V, H]."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @cached_property
    def embedding_scale(self) -> float:
        """Factor by which the model's embedding module multiplies its table; 1 in most models."""
        ids = torch.arange(min(len(self.word_embeddings), 512), device=self.word_embeddings.device)
        with torch.no_grad():
            table = self.word_embeddings[ids].double()
            embeds = self.embed(ids[None])[0].double()
        if torch.equal(table, embeds):
            return 1.0
        return float(embeds.norm() / table.norm())

    @property
    def window(self) -> int | None:
        """Maximum tokens of a row, including soft tokens; None if positions are not limited."""
        limits = (self.learned_positions, max_positions(self.model.config))
        return min((limit for limit in limits if limit is not None), default=None)

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H], the output of the embedding module."""
        return self.stack.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def check_window(self, tokens: int, window: int | None = None) -> None:
        """Refuses rows that are longer than the window.

        Args:
            tokens: Number of tokens of the longest row.
            window: Number of positions (default: `self.window`).

        Raises:
            ValueError: Naming the window.
        """
        window = self.window if window is None else window
        if window is not None and tokens > window:
            raise ValueError(
                f"a row has {tokens} tokens, including soft and generated tokens, but {self.spec.name} has a window of "
                f"{window}; lower the data module's max_tokens, the prompt's length or max_new_tokens"
            )

    def unfreeze(self) -> None:
        """Allows a baseline to change the weights. Prompts still belong to the weights before the change.

        Raises:
            ValueError: If the weights are quantized or prepacked.
        """
        if self.quantized:
            raise ValueError("quantized weights cannot be trained; remove backbone.quantization")
        if self.prepacked:
            raise ValueError("prepacked weights cannot be trained; set backbone.linear_backend to plain")
        self.allow_changes()

    def allow_changes(self) -> None:
        """Prepares for values that change in training, such as rows of the embedding table."""
        self.pin_fingerprint()

    def pin_fingerprint(self) -> None:
        """Keeps the current fingerprint. To be called before the weights change or are sharded."""
        self.pinned_fingerprint, self._pinned_sampled_fingerprint = self.fingerprint(), self.sampled_fingerprint()

    def fingerprint(self) -> str:
        """A digest of all weights, the configuration and the tokenizer, to which prompts are bound.

        It does not depend on the precision. Quantized weights have another fingerprint.
        """
        if self.pinned_fingerprint is not None:
            return self.pinned_fingerprint
        current = versions(self.model)
        if self._weights_hash is None or self._weights_hash[0] != current:
            self._weights_hash = current, self._weights_digest(current)
        return fingerprint(self._weights_hash[1], self.tokenizer_digest, self.spec.quantization)

    def _weights_digest(self, current: tuple[int, ...]) -> str:
        if self.files is not None and self._loaded_versions == current and self.files.is_unchanged:
            return self.files.digest()
        return model_digest(self.model, self._read_weight)

    def _read_weight(self, name: str, weight: Tensor) -> Tensor:
        return self.quantized[name].weight(torch.float32) if name in self.quantized else weight

    @cached_property
    def tokenizer_digest(self) -> str:
        """A digest of everything that determines how text becomes tokens."""
        return tokenizer_digest(self.codec.tokenizer)

    def sampled_fingerprint(self) -> str:
        """The fingerprint as earlier versions computed it, from a sample of the weights."""
        if self._pinned_sampled_fingerprint is not None:
            return self._pinned_sampled_fingerprint
        names = sorted(self.model.named_parameters())[::7]
        sample = ((name, self._read_weight(name, weight), weight.numel()) for name, weight in names)
        return digest_sample(sample, self.model.config, self.hidden_size)
