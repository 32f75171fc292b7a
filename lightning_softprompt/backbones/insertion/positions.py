"""How many positions a model has: by its tables of learned positions, which running it shows, and its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

NAMES = ("max_position_embeddings", "max_encoder_position_embeddings", "n_positions", "max_seq_len")
DECODER_NAMES = ("max_decoder_position_embeddings", *NAMES)


class TableReads(TorchDispatchMode):
    """Records the largest index that is read from each embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[Tensor, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        if func is torch.ops.aten.embedding.default and isinstance(args[0], nn.Parameter) and args[1].numel():
            self.largest[args[0]] = max(self.largest.get(args[0], 0), int(args[1].max()))
        return func(*args, **(kwargs or {}))


def learned_positions(short: TableReads, long: TableReads, step: int) -> int | None:
    """Positions that the smallest table of learned positions has; None without such a table.

    Args:
        short: What a row read.
        long: What a row that is `step` tokens longer read.
        step: At least 2.
    """
    read = [(table, last, short.largest.get(table)) for table, last in long.largest.items()]
    tables = [(table, last) for table, last, before in read if before is not None and last - before == step]
    return min((len(table) - last for table, last in tables), default=None)


def configured_positions(config: PreTrainedConfig, names: tuple[str, ...] = NAMES) -> int | None:
    """Positions that a configuration names; None where they are not limited."""
    text: Any = config.get_text_config()
    found = next((value for name in names if isinstance(value := getattr(text, name, None), int)), 0)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":  # the configured length is the one that it starts to stretch from
        found = int(found * rope.get("factor", 1.0))
    return found if found > 0 else None
