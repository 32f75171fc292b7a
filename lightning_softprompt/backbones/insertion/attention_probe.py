"""Measures how much attention goes to groups of keys, while a model runs and without attention maps.

Attention is linear in its values. With indicators of groups as values, the attention function of a layer therefore
returns the total probability of the keys of each group. Nothing of the size queries times keys is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_softprompt.backbones.insertion.splice import Spliced
from lightning_softprompt.core.types import SoftPrompt

GROUP_BITS = 33  # above every key of a token, see `RowBatch.keys`
Attend = Callable[[Tensor, Tensor | None], Tensor]


class AttentionProbe:
    """The attention mass of some queries, by layer.

    Args:
        layers: The number of each attention module to measure.
        num_groups: G, the number of groups.
        prompt_group: The group of the keys that a prompt injects.

    Attributes:
        masses: Masses [B, U, heads, G] of each layer; they sum to 1 over the groups.
    """

    def __init__(self, layers: Mapping[nn.Module, int], num_groups: int, prompt_group: int) -> None:
        self.layers, self.num_groups, self.prompt_group = layers, num_groups, prompt_group
        self.masses: dict[int, Tensor] = {}
        self._tokens = self._past = torch.empty(0)
        self._select: Callable[[Tensor], Tensor] | None = None

    def place(self, tokens: Tensor, select: Callable[[Tensor], Tensor], past: Tensor | None = None) -> None:
        """Sets the layout of the sequences that run next.

        Args:
            tokens: The group of each key [B|1, K].
            select: Selects the queries [B, U, heads, D] from the output [B|1, Q, heads, D] of an attention.
            past: The group of each key of a past [B|1, C].
        """
        self._tokens, self._select = tokens, select
        self._past = tokens[:1, :0] if past is None else past

    def add(self, module: nn.Module, value: Tensor, past_value: Tensor | None, attend: Attend) -> None:
        """Measures a layer. Runs before the first call of `place`, such as those that fill a cache, are not measured.

        Args:
            module: The attention module.
            value: Values [B|1, N, K, D] of the tokens, after those of injected keys.
            past_value: Values [B|1, N, C, D] of a past, if there is one.
            attend: Computes the output [B|1, Q, heads, D] for other values of these shapes.
        """
        layer = self.layers.get(module)
        if layer is None or self._select is None:
            return
        num_injected = value.shape[2] - self._tokens.shape[1]
        injected = self._tokens.new_full((len(self._tokens), num_injected), self.prompt_group)
        tokens = torch.cat([injected, self._tokens], dim=1)
        size = value.shape[3]
        parts = []
        for start in range(0, self.num_groups, size):
            indicators = self._indicators(tokens, start, value)
            past = None if past_value is None else self._indicators(self._past, start, past_value)
            parts.append(self._select(attend(indicators, past)))
        self.masses[layer] = torch.cat(parts, dim=-1)[..., : self.num_groups]

    def _indicators(self, groups: Tensor, start: int, value: Tensor) -> Tensor:
        """1 where a key [B|1, K] is of group `start` + d, shaped like the value [B|1, N, K, D]."""
        size = value.shape[3]
        padded = one_hot(groups, self.num_groups + size)[..., start : start + size]
        return padded[:, None].to(value.dtype).expand(value.shape).contiguous()


PROBE: ContextVar[AttentionProbe | None] = ContextVar("probe", default=None)


@contextmanager
def use_probe(probe: AttentionProbe) -> Iterator[None]:
    """Measures the attentions that run within the context."""
    token = PROBE.set(probe)
    try:
        yield
    finally:
        PROBE.reset(token)


def spliced_groups(probe: AttentionProbe, rows: Spliced, groups: Tensor, prompt: SoftPrompt | None) -> Tensor:
    """Returns the group of each token [B, M] of spliced rows.

    Args:
        probe: The probe, whose prompt group is that of soft tokens.
        rows: The rows.
        groups: The group of each input token [B, T].
        prompt: The prompt that was inserted.
    """
    length = 0 if prompt is None or prompt.tokens is None else prompt.tokens.shape[1]
    soft = groups.new_full((len(groups), length), probe.prompt_group)
    return torch.cat([soft, groups], dim=1).gather(1, rows.order)


def add_groups(keys: Tensor, groups: Tensor) -> Tensor:
    """Stores the group of each token in its key, so that equal keys still mean equal tokens.

    Args:
        keys: [B, M] as in `RowBatch.keys`.
        groups: [B, M].
    """
    shifted = groups << GROUP_BITS
    return torch.where(keys >= 0, keys + shifted, keys - shifted)


def groups_of(keys: Tensor) -> Tensor:
    """Returns the groups that `add_groups` stored in keys."""
    return keys.abs() >> GROUP_BITS
