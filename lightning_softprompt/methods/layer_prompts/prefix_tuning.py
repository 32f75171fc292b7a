"""Prefix tuning (Li and Liang, ACL 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.requirements import takes_keys_and_values
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.kv_prefix import Activations, DeepPrompt, KeysValuesInit, build_key_values
from lightning_softprompt.prompts.networks import Activation


class PrefixTuning(SoftPromptModule):
    """Keys and values before those of the input, in every layer, optionally reparameterized in training.

    Paper: Li and Liang 2021, arXiv 2101.00190
    Enters: keys and values of every attention; no slot is used
    Parameters: P * 2 * L * N * D; in training P * H + H * M + M + (M + 1) * 2 * L * N * D with a network of width M

    Differences from the paper: the network starts exactly at the activations, with its last layer solved by least
    squares instead of 500 steps of Adam; in encoders, real tokens keep the positions they have without a prefix; one
    mask of `prompt_dropout` per step is shared by all rows, so that they share the prefix.

    Args:
        length: P, the number of positions in every kind of attention.
        lengths: P of each kind of attention: `encoder`, `decoder` and `cross` in an encoder-decoder, `self` in other
            models. Kinds that are 0 or missing get no prefix.
        width: M, hidden width of the network that computes keys and values from P embeddings; None trains them
            directly, which requires a higher learning rate.
        depth: Number of activations in the network.
        activation: Activation of the network.
        init: Initial keys and values (default: the activations of a word).
        common: Arguments of every method.
    """

    requires = (takes_keys_and_values,)

    default_rate = 3e-4  # with a network, the best of three on SST-2, benchmarks/LOG.md; without a network, use 0.02

    def __init__(
        self,
        length: int = 10,
        lengths: Mapping[str, int] | None = None,
        width: int | None = 512,
        depth: int = 1,
        activation: Activation = "tanh",
        init: KeysValuesInit | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.length, self.lengths = length, lengths
        self.width, self.depth, self.activation = width, depth, activation
        self.init = init or Activations()

    def build(self, backbone: Backbone) -> None:
        """Creates `prefixes`, one per kind of attention."""
        kinds = backbone.attentions
        lengths = dict.fromkeys(kinds, self.length) if self.lengths is None else dict(self.lengths)
        if not set(lengths) <= set(kinds) or not any(lengths.values()):
            raise ValueError(f"lengths requires a number of positions for some of {sorted(kinds)}, got {lengths}")
        self.prefixes = nn.ModuleDict({kind: self._prefix(backbone, kind, p) for kind, p in lengths.items() if p})

    def _prefix(self, backbone: Backbone, kind: str, length: int) -> DeepPrompt:
        sites = backbone.attentions[kind]
        first = self.init(backbone, kind, length)
        key_values = build_key_values(first, backbone.hidden_size, self.width, self.depth, self.activation)
        return DeepPrompt(sites.heads, range(len(sites)), key_values)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the same keys and values for every row."""
        return SoftPrompt(kv={kind: prefix() for kind, prefix in self.prefixes.items()})
