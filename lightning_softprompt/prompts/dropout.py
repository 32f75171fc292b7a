"""Dropout of a soft prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.nn.functional import dropout

from lightning_softprompt.core.types import SoftPrompt


def apply_dropout(prompt: SoftPrompt, rate: float) -> SoftPrompt:
    """Applies dropout to all tensors of a prompt.

    Tensors that are shared by all rows have one mask for all rows.
    """
    kv: dict[str, Any] = {kind: {} for kind in prompt.kv}
    for kind, layers in prompt.kv.items():
        for layer, (key, value) in layers.items():
            kv[kind][layer] = dropout(key, rate), dropout(value, rate)
    tokens = None if prompt.tokens is None else dropout(prompt.tokens, rate)
    hidden = {layer: dropout(states, rate) for layer, states in prompt.hidden.items()}
    return replace(prompt, tokens=tokens, kv=kv, hidden=hidden)
