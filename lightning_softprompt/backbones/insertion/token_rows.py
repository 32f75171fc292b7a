"""Trainable rows in place of some rows of the embedding table and of the head, which stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Rows = Callable[[], Tensor]  # the current rows [N, H]


class TokenSlots:
    """The positions of tokens among trainable rows.

    Args:
        ids: [N] ids of the tokens.
        size: V, rows of the table.
    """

    def __init__(self, ids: Tensor, size: int) -> None:
        self.ids = ids
        self.slots = torch.full((size,), -1, device=ids.device)
        self.slots[ids] = torch.arange(len(ids), device=ids.device)

    def replace(self, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """Returns values [..., H] of tokens `ids`, with trainable rows [N, H] in place of those of their tokens."""
        slots = self.slots[ids]
        replacements = rows.to(values.dtype)[slots.clamp(min=0)]
        return torch.where((slots >= 0)[..., None], replacements, values)


def replace_embeddings_of(model: Any, slots: TokenSlots, rows: Rows, scale: float) -> list[RemovableHandle]:
    """Replaces the output of all embedding modules that share the table of a model, for some tokens.

    Args:
        model: The model.
        slots: The tokens.
        rows: Returns their rows.
        scale: Factor by which the model multiplies its table.

    Returns:
        Handles that remove the replacement.
    """
    table = model.get_input_embeddings().weight

    def replace(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        current = rows()
        return slots.replace(current if scale == 1 else current * scale, args[0], out)

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [module.register_forward_hook(replace) for module in embeddings if module.weight is table]
