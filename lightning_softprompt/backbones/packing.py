"""Padded batch to one packed row and back: `[shared head | row 1 | row 2 | ...]`, without padding.

The head is what all rows of a batch begin with, literal tokens and soft tokens that are the same for every row alike.
It runs once a step instead of once a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How rows lie in a packed row.

    Args:
        head: Tokens of the shared head.
        source: [B, n] where token t of each row's own part comes from in the packed row, counted from the head's end;
            anything where the row is shorter.
        inside: [B, n] bool, False where the row is shorter.
        places: [R] where each packed token of the rows' own parts lies in the flattened [B * n].
    """

    head: int
    source: Tensor
    inside: Tensor
    places: Tensor

    @property
    def rows(self) -> tuple[int, int]:
        """B and n, the longest own part."""
        return self.inside.shape[0], self.inside.shape[1]

    @property
    def positions(self) -> Tensor:
        """[1, head + R] the position of each packed token in its own row."""
        own = self.places % self.rows[1] + self.head
        return torch.cat([torch.arange(self.head, device=own.device), own])[None]

    def columns(self, columns: Tensor) -> Tensor:
        """[B, U] columns of the padded rows -> [1, B * U] places in the packed row."""
        own = (columns - self.head).clamp(min=0)
        packed = self.head + self.source.gather(1, own.clamp(max=self.rows[1] - 1))
        return torch.where(columns < self.head, columns, packed).flatten()[None]


def pack(mask: Tensor, head: int) -> Packing:
    """The packing of right-padded rows [B, M] that share their first `head` tokens."""
    inside = mask[:, head:]
    places = inside.flatten().nonzero()[:, 0]
    source = (inside.flatten().cumsum(0) - 1).clamp(min=0).view(inside.shape)
    return Packing(head, source, inside, places)


def packed(rows: Tensor, packing: Packing) -> Tensor:
    """[B, M, H] right-padded -> [1, head + R, H], the head taken from the first row."""
    own = rows[:, packing.head :].flatten(0, 1)[packing.places]
    return torch.cat([rows[0, : packing.head], own])[None]


def shared_head(keys: Tensor, mask: Tensor) -> int:
    """How many leading tokens all rows share; at least one row keeps a token of its own, and a single row keeps all.

    Args:
        keys: [B, M] numbers that are equal where rows have the same token.
        mask: [B, M] bool.
    """
    if len(keys) == 1:
        return 0
    same = (keys == keys[:1]).all(0) & mask.all(0)  # [M]
    return min(int(same.int().cumprod(0).sum()), int(mask.sum(1).max()) - 1)
