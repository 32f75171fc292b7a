"""Token ids whose embeddings are replaced, so that a model that accepts only ids reads soft tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reading:
    """The input of generation: token ids, and the embeddings of the first of them.

    Args:
        ids: [B, M] token ids, with placeholders for soft tokens and padding.
        embeds: [B, m, H] embeddings of the first m tokens.
        inputs: Further inputs of transformers' `generate`: masks, positions and a cache.
    """

    ids: Tensor
    embeds: Tensor
    inputs: dict[str, Any]


@contextmanager
def replace_embeddings(stack: PreTrainedModel, reading: Reading, once: bool = False) -> Iterator[None]:
    """Replaces the embeddings of the first tokens with those of a reading.

    Args:
        stack: The model, or its encoder.
        reading: The tokens of the first pass; a cache may cover their beginning.
        once: Whether only the first pass reads these tokens. Without a cache, each pass reads them.
    """
    embeds, length = reading.embeds, reading.ids.shape[1]
    is_first = True

    def replace(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        nonlocal is_first
        columns = out.shape[1]
        if not is_first and columns <= length:
            return None
        if once:
            handle.remove()
        is_first = False
        begin = max(length - columns, 0)  # columns that the cache covers
        rows = embeds[:, begin:].repeat_interleave(len(out) // len(embeds), dim=0)
        return torch.cat([rows.to(out), out[:, rows.shape[1] :]], dim=1)

    handle = stack.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
