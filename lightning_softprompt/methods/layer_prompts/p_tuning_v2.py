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
    """Deep prompts for understanding: free keys and values in some or all layers, read off by a head or label words.

    With the readout `ClassHead`, as in the paper, a linear head is trained with them; `TokenHead` is its like for tags.

    Paper: Liu et al. 2022, arXiv 2110.07602
    Enters: keys and values of the layers named; no slot is used
    Parameters: P * 2 * L * N * D, and C * H + C of the head

    Differences from the paper: real tokens of an encoder keep the positions they have without a prompt; keys and values
    start small, not with variance 1; of an encoder-decoder, the encoder's attention is prompted.

    Args:
        length: P.
        layers: Numbers of the layers prompted, counted from 0, or from the end where negative; None takes all.
        width: Of a network tanh(P H -> width) -> keys and values, which helps on some tasks; None trains them freely.
        init: Where keys and values start; None draws small ones.
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
        """Makes `prefix`."""
        self.kind, sites = next(iter(backbone.attentions.items()))
        depth = len(sites)
        wanted = range(depth) if self.layers is None else self.layers
        if not wanted or not all(-depth <= layer < depth for layer in wanted):
            raise ValueError(f"layers must be numbers from {-depth} to {depth - 1}, got {self.layers}")
        numbers = sorted({layer % depth for layer in wanted})
        first = self.init(backbone, self.kind, self.length)[numbers]
        made = build_key_values(first, backbone.hidden_size, self.width)
        self.prefix = DeepPrompt(sites.heads, numbers, made)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same keys and values for every row."""
        return SoftPrompt(kv={self.kind: self.prefix()})
