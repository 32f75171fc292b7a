"""Runs rows that do not fit in memory together in parts, which the backward pass recomputes."""

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
def use_microbatches(backbone: Backbone, parts: int) -> Iterator[None]:
    """Runs the rows of a backbone in parts within the context. The backward pass needs the memory of one part.

    A row's states do not depend on other rows, and the backbone is not random. Therefore everything computed from the
    states is the same: loss, penalties and gradients, up to the order of sums.

    Args:
        backbone: The backbone, whose `states` and `hidden_states` are replaced within the context.
        parts: Number of parts.
    """
    if parts == 1:
        yield
        return
    run_states, run_hidden = backbone.states, backbone.hidden_states

    def states(batch: Batch, prompt: SoftPrompt | None = None, columns: Tensor | None = None) -> States:
        return States.join(_run_parts(run_states, batch, prompt, parts, columns))

    def hidden_states(batch: Batch, prompt: SoftPrompt | None = None, layer: int | None = None) -> Tensor:
        return torch.cat(_run_parts(partial(run_hidden, layer=layer), batch, prompt, parts))

    backbone.states, backbone.hidden_states = states, hidden_states  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone.states, backbone.hidden_states


def _run_parts(
    run: Callable[..., Any], batch: Batch, prompt: SoftPrompt | None, parts: int, columns: Tensor | None = None
) -> list[Any]:
    rows_of_parts = [part.tolist() for part in torch.arange(len(batch)).chunk(parts)]

    def select(rows: list[int]) -> tuple[Any, ...]:
        of_rows = () if columns is None else (columns[rows],)
        return batch.only(rows), prompt and prompt.only(rows), *of_rows

    with torch.no_grad():  # the first run may include trials, whose tensors must not be saved
        run(*select(rows_of_parts[0][:1]))
    run_part = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return [run_part(*select(rows)) for rows in rows_of_parts]
