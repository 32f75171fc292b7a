"""Dropout of a soft prompt."""

from __future__ import annotations

from dataclasses import replace

from torch.nn.functional import dropout

from lightning_softprompt.core.types import SoftPrompt


def apply_dropout(prompt: SoftPrompt, rate: float) -> SoftPrompt:
    """The prompt with a share of its numbers at zero, and the rest as much larger.

    What is the same for every row stays so: one draw serves them all.
    """
    kv = {
        kind: {layer: (dropout(key, rate), dropout(value, rate)) for layer, (key, value) in layers.items()}
        for kind, layers in prompt.kv.items()
    }
    tokens = None if prompt.tokens is None else dropout(prompt.tokens, rate)
    hidden = {layer: dropout(states, rate) for layer, states in prompt.hidden.items()}
    return replace(prompt, tokens=tokens, kv=kv, hidden=hidden)
