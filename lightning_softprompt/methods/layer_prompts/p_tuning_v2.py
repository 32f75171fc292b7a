"""P-tuning v2 (Liu et al., ACL 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.requirements import takes_keys_and_values
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.kv_prefix import DeepPrompt, KeysValuesInit, NormalKeysValues, build_key_values


class PTuningV2(SoftPromptModule):
    """Deep prompts for classification and tagging: trained keys and values in some or all layers.

    With the readout `ClassHead`, as in the paper, a linear head is trained too; `TokenHead` is the token-level
    counterpart.

    Paper: Liu et al. 2022, arXiv 2110.07602
    Enters: keys and values of the layers named; no slot is used
    Parameters: P * 2 * L * N * D, and C * H + C of the head

    Differences from the paper: real tokens of an encoder keep the positions they have without a prompt; keys and values
    start small, not with variance 1; in an encoder-decoder, only the encoder's attention is prompted.

    Args:
        length: P, the number of positions.
        layers: Indices of the prompted layers; negative ones count from the end (default: all layers).
        width: Hidden width of a network tanh(P H -> width) -> keys and values, which helps on some tasks; None trains
            keys and values directly.
        init: Initial keys and values (default: normal with a small standard deviation).
        common: Arguments of every method.
    """

    requires = (takes_keys_and_values,)

    def __init__(
        self,
        length: int = 20,
        layers: Sequence[int] | None = None,
        width: int | None = None,
        init: KeysValuesInit | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.layers, self.width = length, layers, width
        self.init = init or NormalKeysValues()

    def build(self, backbone: Backbone) -> None:
        """Creates `prefix`."""
        self.kind, sites = next(iter(backbone.attentions.items()))
        depth = len(sites)
        layers = range(depth) if self.layers is None else self.layers
        if not layers or not all(-depth <= layer < depth for layer in layers):
            raise ValueError(f"layers must be numbers from {-depth} to {depth - 1}, got {self.layers}")
        indices = sorted({layer % depth for layer in layers})
        first = self.init(backbone, self.kind, self.length)[indices]
        key_values = build_key_values(first, backbone.hidden_size, self.width)
        self.prefix = DeepPrompt(sites.heads, indices, key_values)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same keys and values for every row."""
        return SoftPrompt(kv={self.kind: self.prefix()})
