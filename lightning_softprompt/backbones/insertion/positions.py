"""The number of positions of a model, from its tables of learned positions and its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

NAMES = ("max_position_embeddings", "max_encoder_position_embeddings", "n_positions", "max_seq_len")
DECODER_NAMES = ("max_decoder_position_embeddings", *NAMES)


class TableReads(TorchDispatchMode):
    """Records the largest index that a run reads from each embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[Tensor, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and records the indices if it reads an embedding table."""
        if func is torch.ops.aten.embedding.default:
            self._record(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _record(self, table: Tensor, indices: Tensor) -> None:
        if isinstance(table, nn.Parameter) and indices.numel():
            self.largest[table] = max(self.largest.get(table, 0), int(indices.max()))


def count_learned_positions(short: TableReads, long: TableReads, step: int) -> int | None:
    """Returns the number of positions in the smallest table of learned positions; None without such a table.

    A table of positions is one whose largest index grows with the length of a row.

    Args:
        short: The reads of a row.
        long: The reads of a row that is `step` tokens longer.
        step: Difference of the lengths, at least 2.
    """
    remaining = []  # positions of each table after the last one that the longer row reads
    for table, last in long.largest.items():
        last_of_short = short.largest.get(table)
        if last_of_short is not None and last - last_of_short == step:
            remaining.append(len(table) - last)
    return min(remaining, default=None)


def max_positions(config: PreTrainedConfig, names: tuple[str, ...] = NAMES) -> int | None:
    """Returns the number of positions in a configuration; None if they are not limited."""
    text: Any = config.get_text_config()
    values = [getattr(text, name, None) for name in names]
    positions = next((value for value in values if isinstance(value, int)), 0)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":  # positions are stretched from the configured length on
        positions = int(positions * rope.get("factor", 1.0))
    return positions if positions > 0 else None
