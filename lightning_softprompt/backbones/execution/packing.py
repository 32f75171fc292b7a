"""Padded batch to one packed row and back: `[shared head | row 1 | row 2 | ...]`, without padding.

The head is what all rows of a batch begin with, literal tokens and soft tokens that are the same for every row alike.
It runs once a step instead of once a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise

import torch
from torch import Tensor

from lightning_softprompt.core.types import Pairs

Kept = dict[int, tuple[Tensor, Tensor]]  # keys and values of each layer
CUTS = 16  # places where groups of rows may be cut
COPIES = 1  # tokens copied for each token of the rows, up to which copies cost less than a second attention and a merge
GROUP = 2000  # what a further group costs, in query-key pairs


@dataclass(frozen=True)
class Past:
    """Keys and values of what comes before the packed tokens.

    Args:
        layers: Keys and values [B|1, N, C, D] by layer; a leading 1 is the same for every row.
        inside: [B|1, C] bool, False where a row's past is shorter.
    """

    layers: Pairs
    inside: Tensor

    @property
    def shared(self) -> bool:
        """Whether all rows have the same."""
        return len(self.inside) == 1

    @cached_property
    def lengths(self) -> Tensor:
        """[B|1] tokens."""
        return self.inside.sum(1)


@dataclass(frozen=True)
class Groups:
    """Rows apart from each other, in groups that are padded each to its own longest.

    Args:
        rows: Those of each group.
        shapes: B and n of each group.
        source: [sum of B * n] where each place's token comes from in the packed row, counted from the head's end;
            anything behind the end of a row.
        gaps: The places behind the end of a row.
        places: [R] the place of each packed token.
    """

    rows: tuple[list[int], ...]
    shapes: tuple[tuple[int, int], ...]
    source: Tensor
    gaps: Tensor
    places: Tensor


@dataclass(frozen=True)
class Packing:
    """How rows lie in a packed row, and what comes before it.

    Args:
        head: Tokens of the shared head.
        source: [B, n] where token t of each row's own part comes from in the packed row, counted from the head's end;
            anything where the row is shorter.
        inside: [B, n] bool, False where the row is shorter.
        places: [R] where each packed token of the rows' own parts lies in the flattened [B * n].
        past: What comes before the head, or before the rows where there is no head.
        kept: Takes the keys and values of each layer, where they are to be kept.
    """

    head: int
    source: Tensor
    inside: Tensor
    places: Tensor
    past: Past | None = None
    kept: Kept | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """B and n, the longest own part."""
        return self.inside.shape[0], self.inside.shape[1]

    @property
    def length(self) -> int:
        """Tokens of the packed row."""
        return self.head + len(self.places)

    @property
    def positions(self) -> Tensor:
        """[1, head + R] the position of each packed token in its own row, the past included."""
        batch, longest = self.rows
        own = self.places % longest + self.head
        head = torch.arange(self.head, device=own.device)
        if self.past is None:
            return torch.cat([head, own])[None]
        before = self.past.lengths
        return torch.cat([head + before[:1], own + before.expand(batch)[self.places // longest]])[None]

    @cached_property
    def groups(self) -> Groups:
        """The rows as attention takes them: those of like length together, unless each has a past of its own."""
        lengths = [max(1, length) for length in self.inside.sum(1).tolist()]  # a kernel wants a token of each row
        parts = self._parts(lengths)
        longest = [max(lengths[row] for row in rows) for rows in parts]
        cuts = list(zip(parts, longest, strict=True))
        inside = torch.cat([self.inside[rows, :n].flatten() for rows, n in cuts])
        source = torch.cat([self.source[rows, :n].flatten() for rows, n in cuts])
        places = torch.empty_like(self.places)
        places[source[inside]] = inside.nonzero()[:, 0]
        shapes = tuple((len(rows), n) for rows, n in cuts)
        return Groups(tuple(parts), shapes, source, (~inside).nonzero()[:, 0], places)

    def _parts(self, lengths: list[int]) -> list[list[int]]:
        """Rows that have no past apart from those that have one, which attend under a mask."""
        every = list(range(len(lengths)))
        if self.places.device.type != "cpu":
            return [every]
        if self.past is None or self.past.shared:
            return of_like_length(lengths)
        having = self.past.inside.any(1).tolist()
        if all(having):
            return [every]
        kinds = [[row for row in every if having[row] == kind] for kind in (False, True)]
        return [[rows[i] for i in own] for rows in kinds if rows for own in of_like_length([lengths[r] for r in rows])]

    @cached_property
    def bare(self) -> Packing:
        """The same rows in a layer that has no past."""
        return replace(self, past=None)

    @cached_property
    def head_mask(self) -> Tensor | None:
        """[1, 1, head, C + head] what the head's tokens see, where they have a past."""
        if self.past is None or not self.past.shared:
            return None
        return torch.cat([self.past.inside.expand(self.head, -1), self._causal(self.head)], dim=1)[None, None]

    @cached_property
    def own_pasts(self) -> tuple[int, ...]:
        """Tokens of the past that each group's rows have at most, where each row has a past of its own."""
        if self.past is None or self.past.shared:
            return (0,) * len(self.groups.rows)
        last = (self.past.inside * torch.arange(1, self.past.inside.shape[1] + 1, device=self.places.device)).amax(1)
        return tuple(int(last[rows].max()) for rows in self.groups.rows)

    @property
    def shared(self) -> int:
        """Tokens that all rows see, those of a shared past included."""
        return self.head + (self.past.inside.shape[1] if self.past is not None and self.past.shared else 0)

    @cached_property
    def copied(self) -> bool:
        """Whether each row has a copy of what is shared, which then is not attended to apart."""
        cheap = 0 < self.shared * self.rows[0] <= COPIES * len(self.places)
        return cheap and self.places.device.type == "cpu"

    @cached_property
    def own_masks(self) -> list[Tensor | None]:
        """What rows see by group: [1, 1, n, C + n] behind a copy, [B, 1, n, C + n] with pasts of their own; else None.

        A row without a past of its own is in no group with one that has it, where that is faster.
        """
        groups = self.groups
        if self.copied:
            return [self._causal(self.shared + n)[None, None, self.shared :] for _, n in groups.shapes]
        each = zip(groups.rows, groups.shapes, self.own_pasts, strict=True)
        return [self._own_mask(rows, n, past) if past else None for rows, (_, n), past in each]

    def _own_mask(self, rows: list[int], longest: int, past: int) -> Tensor:
        assert self.past is not None
        before = self.past.inside[rows, None, :past].expand(-1, longest, -1)
        return torch.cat([before, self._causal(longest).expand(len(rows), -1, -1)], dim=2)[:, None]

    def _causal(self, size: int) -> Tensor:
        return torch.ones(size, size, dtype=torch.bool, device=self.places.device).tril()

    def packed(self, rows: Tensor) -> Tensor:
        """[B, M, H] right-padded -> [1, head + R, H], the head taken from the first row."""
        own = rows[:, self.head :].flatten(0, 1)[self.places]
        return torch.cat([rows[0, : self.head], own])[None]

    def columns(self, columns: Tensor) -> Tensor:
        """[B, U] columns of the padded rows -> [1, B * U] places in the packed row."""
        own = (columns - self.head).clamp(min=0)
        packed = self.head + self.source.gather(1, own.clamp(max=self.rows[1] - 1))
        return torch.where(columns < self.head, columns, packed).flatten()[None]


def of_like_length(lengths: Sequence[int], most: int = 3) -> list[list[int]]:
    """Rows in at most so many groups, for which attention over padded rows costs least.

    >>> of_like_length([10, 200, 11, 200])
    [[0, 2], [1, 3]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cuts = sorted({round(len(order) * part / CUTS) for part in range(1, CUTS)} - {0, len(order)})

    def cost(bounds: tuple[int, ...]) -> int:
        ends = (*bounds, len(order))
        return sum((end - begin) * lengths[order[end - 1]] ** 2 + GROUP for begin, end in pairwise((0, *ends)))

    best = min((bounds for n in range(most) for bounds in combinations(cuts, n)), key=cost)
    return [order[begin:end] for begin, end in pairwise((0, *best, len(order)))]


def pack(mask: Tensor, head: int, past: Past | None = None, kept: Kept | None = None) -> Packing:
    """The packing of right-padded rows [B, M] that share their first `head` tokens."""
    inside = mask[:, head:]
    places = inside.flatten().nonzero()[:, 0]
    source = (inside.flatten().cumsum(0) - 1).clamp(min=0).view(inside.shape)
    return Packing(head, source, inside, places, past, kept)


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
