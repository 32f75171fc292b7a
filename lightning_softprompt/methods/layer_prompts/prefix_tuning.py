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
    """Keys and values before those of the input, in every layer, free or made by a network while training.

    Paper: Li and Liang 2021, arXiv 2101.00190
    Enters: keys and values of every attention; no slot is used
    Parameters: P * 2 * L * N * D; while training P * H + H * M + M + (M + 1) * 2 * L * N * D with a network of width M

    Differences from the paper: the network starts at the activations exactly, its last layer solved by least squares,
    where 500 steps of Adam go some of the way; in encoders, real tokens keep the positions they have without a prefix;
    `prompt_dropout` is drawn once a step for all rows, so that they go on sharing the prefix.

    Args:
        length: P, in every kind of attention.
        lengths: P by kind, where they differ: of an encoder-decoder `encoder`, `decoder` and `cross`, of others
            `self`; 0 leaves one out, and so does leaving it unnamed.
        width: M of the network that makes keys and values of P embeddings; None trains them freely, which wants a
            higher learning rate.
        depth: How many activations the network has.
        activation: Of the network.
        init: Where keys and values start, made by a network or not; None takes the activations of a word.
        common: Arguments of every method.
    """

    requires = (takes_keys_and_values,)

    default_rate = 3e-4  # of the network, the best of three on SST-2, benchmarks/LOG.md; free ones want 0.02

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
        self.width, self.depth, self.activation, self.init = width, depth, activation, init or Activations()

    def build(self, backbone: Backbone) -> None:
        """Makes `prefixes`, by kind of attention."""
        kinds = backbone.attentions
        lengths = dict.fromkeys(kinds, self.length) if self.lengths is None else dict(self.lengths)
        if not set(lengths) <= set(kinds) or not any(lengths.values()):
            raise ValueError(f"lengths wants a number of soft tokens for some of {sorted(kinds)}, got {lengths}")
        self.prefixes = nn.ModuleDict({kind: self._prefix(backbone, kind, p) for kind, p in lengths.items() if p})

    def _prefix(self, backbone: Backbone, kind: str, length: int) -> DeepPrompt:
        sites = backbone.attentions[kind]
        first = self.init(backbone, kind, length)
        made = build_key_values(first, backbone.hidden_size, self.width, self.depth, self.activation)
        return DeepPrompt(sites.heads, range(len(sites)), made)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The same keys and values for every row."""
        return SoftPrompt(kv={kind: prefix() for kind, prefix in self.prefixes.items()})
