"""Random rows of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.prompts.token_rows.base import TokenRowsInit


@dataclass(frozen=True)
class NormalRows(TokenRowsInit):
    """Rows drawn from a normal distribution around 0.

    Args:
        std: Standard deviation (default: the root mean square of the existing rows).
    """

    std: float | None = None

    def __call__(self, backbone: Backbone, tables: Sequence[Tensor], tokens: Sequence[AddedRow]) -> list[Tensor]:
        """See `TokenRowsInit`."""
        return [self._draw(table.float(), len(tokens)) for table in tables]

    def _draw(self, rows: Tensor, count: int) -> Tensor:
        std = float(rows.pow(2).mean().sqrt()) if self.std is None else self.std
        return torch.randn(count, rows.shape[1]).to(rows) * std
