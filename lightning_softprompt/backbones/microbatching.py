"""Rows that do not fit into memory together, run one part after the other, and once more in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.core.types import Batch, SoftPrompt


@contextmanager
def microbatched(backbone: Backbone, parts: int) -> Iterator[None]:
    """Within it, the backbone runs rows in so many parts, and keeps for the backward pass what one part needs.

    A row's states do not depend on the other rows, and nothing in the backbone is drawn at random, so whatever is made
    of the states is the same: loss, penalties and gradients, up to the order of sums.
    """
    if parts == 1:
        yield
        return
    states, hidden = backbone.states, backbone.hidden_states

    def of_parts(batch: Batch, prompt: SoftPrompt | None = None) -> States:
        return States.join(_each(states, batch, prompt, parts))

    def hidden_of_parts(batch: Batch, prompt: SoftPrompt | None = None, layer: int | None = None) -> Tensor:
        return torch.cat(_each(partial(hidden, layer=layer), batch, prompt, parts))

    backbone.states, backbone.hidden_states = of_parts, hidden_of_parts  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone.states, backbone.hidden_states


def _each(run: Callable[..., Any], batch: Batch, prompt: SoftPrompt | None, parts: int) -> list[Any]:
    places = [part.tolist() for part in torch.arange(len(batch)).chunk(parts)]
    with torch.no_grad():  # what a backbone finds out at its first run must not count as kept
        run(batch.only(places[0][:1]), prompt and prompt.only(places[0][:1]))
    given = ((batch.only(rows), prompt and prompt.only(rows)) for rows in places)
    return [checkpoint(run, *of, use_reentrant=False, preserve_rng_state=False) for of in given]
