"""Random rows of new tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.prompts.token_rows.base import Subwords, TokenRowsInit


@dataclass(frozen=True)
class NormalRows(TokenRowsInit):
    """Rows drawn from a normal distribution around 0.

    Args:
        std: Standard deviation (default: the root mean square of the existing rows).
    """

    std: float | None = None

    def __call__(self, backbone: Backbone, table: Tensor, subwords: Subwords, is_output: bool) -> Tensor:
        """See `TokenRowsInit`."""
        std = float(table.float().pow(2).mean().sqrt()) if self.std is None else self.std
        return torch.randn(len(subwords), table.shape[1]).to(table.device) * std
