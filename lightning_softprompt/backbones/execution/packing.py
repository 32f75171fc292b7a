"""Packs a padded batch into one sequence `[shared prefix | row 1 | row 2 | ...]` without padding, and unpacks it.

The shared prefix consists of the tokens that all rows of a batch begin with: equal text, and soft tokens that are the
same for every row. It runs once per step instead of once per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise

import torch
from torch import Tensor

from lightning_softprompt.core.types import Pairs

KeyValueStore = dict[int, tuple[Tensor, Tensor]]  # keys and values of each layer
MAX_CUTS = 16  # positions at which the sorted rows may be divided into groups
# Copies of the prefix cost less than a second attention and a merge, up to this number of copied tokens per row token.
MAX_COPIES_PER_TOKEN = 1
GROUP_OVERHEAD = 2000  # cost of another group, in query-key pairs


@dataclass(frozen=True)
class Past:
    """Keys and values of the tokens that precede the packed tokens.

    Args:
        layers: Keys and values [B|1, N, C, D] by layer; a leading 1 is shared by all rows.
        mask: [B|1, C] bool, False where the past of a row is shorter.
    """

    layers: Pairs
    mask: Tensor

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same past."""
        return len(self.mask) == 1

    @property
    def size(self) -> int:
        """C, the length of the longest past."""
        return self.mask.shape[1]

    @cached_property
    def lengths(self) -> Tensor:
        """[B|1] tokens of each past."""
        return self.mask.sum(1)


@dataclass(frozen=True)
class Groups:
    """Rows divided into groups, each of which is padded to its longest row.

    Args:
        rows: The rows of each group.
        shapes: B and n of each group.
        source: [sum of B * n] index in the packed sequence, counted from the end of the prefix, of the token at each
            position; arbitrary at padding.
        gaps: The positions that are padding.
        positions: [R] the position of each packed token.
    """

    rows: tuple[list[int], ...]
    shapes: tuple[tuple[int, int], ...]
    source: Tensor
    gaps: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Packing:
    """The layout of a packed sequence, and the past that precedes it.

    Args:
        prefix: Number of tokens of the shared prefix.
        source: [B, n] index in the packed sequence, counted from the end of the prefix, of token t after the prefix of
            each row; arbitrary where the row is shorter.
        mask: [B, n] bool, False where the row is shorter.
        flat_index: [R] index of each packed token after the prefix in the flattened [B * n].
        past: What precedes the prefix, or the rows if there is no prefix.
        collected: If not None, the attention stores the keys and values of each layer in it.
    """

    prefix: int
    source: Tensor
    mask: Tensor
    flat_index: Tensor
    past: Past | None = None
    collected: KeyValueStore | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """B and n, the length of the longest row after the prefix."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def length(self) -> int:
        """Tokens of the packed sequence."""
        return self.prefix + len(self.flat_index)

    @property
    def positions(self) -> Tensor:
        """[1, prefix + R] the position of each packed token in its row, including the past."""
        batch, longest = self.shape
        in_row = self.flat_index % longest + self.prefix
        in_prefix = torch.arange(self.prefix, device=in_row.device)
        if self.past is None:
            return torch.cat([in_prefix, in_row])[None]
        past = self.past.lengths
        past_of_token = past.expand(batch)[self.flat_index // longest]
        after_past = [in_prefix + past[:1], in_row + past_of_token]
        return torch.cat(after_past)[None]

    @cached_property
    def groups(self) -> Groups:
        """The rows as attention processes them: rows of similar length together."""
        lengths = [max(1, length) for length in self.mask.sum(1).tolist()]  # kernels require a token in each row
        groups = self._group_rows(lengths)
        longest = [max(lengths[row] for row in rows) for rows in groups]
        pairs = list(zip(groups, longest, strict=True))
        masks, sources = [], []
        for rows, n in pairs:
            masks.append(self.mask[rows, :n].flatten())
            sources.append(self.source[rows, :n].flatten())
        mask, source = torch.cat(masks), torch.cat(sources)
        positions = torch.empty_like(self.flat_index)
        positions[source[mask]] = mask.nonzero()[:, 0]
        shapes = tuple((len(rows), n) for rows, n in pairs)
        gaps = (~mask).nonzero()[:, 0]
        return Groups(tuple(groups), shapes, source, gaps, positions)

    def _group_rows(self, lengths: list[int]) -> list[list[int]]:
        """Separates rows with a past, which attend under a mask, from rows without one."""
        all_rows = list(range(len(lengths)))
        if self.flat_index.device.type != "cpu":
            return [all_rows]
        if self.past is None or self.past.is_shared:
            return group_by_length(lengths)
        has_past = self.past.mask.any(1).tolist()
        if all(has_past):
            return [all_rows]
        groups: list[list[int]] = []
        for kind in (False, True):
            rows = [row for row in all_rows if has_past[row] == kind]
            groups_of_kind = group_by_length([lengths[row] for row in rows]) if rows else []
            groups += [[rows[index] for index in group] for group in groups_of_kind]
        return groups

    @cached_property
    def without_past(self) -> Packing:
        """The same rows in a layer that has no past."""
        return replace(self, past=None)

    @cached_property
    def prefix_mask(self) -> Tensor | None:
        """[1, 1, prefix, C + prefix] what the tokens of the prefix attend to, if they have a past."""
        if self.past is None or not self.past.is_shared:
            return None
        past_mask = self.past.mask.expand(self.prefix, -1)
        causal_mask = self._causal(self.prefix)
        return torch.cat([past_mask, causal_mask], dim=1)[None, None]

    @cached_property
    def past_lengths(self) -> tuple[int, ...]:
        """The longest past of each group if each row has its own past; else 0 for each group."""
        if self.past is None or self.past.is_shared:
            return (0,) * len(self.groups.rows)
        ends = torch.arange(1, self.past.size + 1, device=self.flat_index.device)
        last = (self.past.mask * ends).amax(1)
        return tuple(int(last[rows].max()) for rows in self.groups.rows)

    @property
    def shared_length(self) -> int:
        """Number of tokens that all rows attend to, including a shared past."""
        past = self.past.size if self.past is not None and self.past.is_shared else 0
        return self.prefix + past

    @cached_property
    def copies_shared_prefix(self) -> bool:
        """Whether each row gets a copy of the shared tokens, which saves a separate attention to them."""
        copies = self.shared_length * self.shape[0]
        is_cheap = 0 < copies <= MAX_COPIES_PER_TOKEN * len(self.flat_index)
        return is_cheap and self.flat_index.device.type == "cpu"

    @cached_property
    def row_masks(self) -> list[Tensor | None]:
        """What the rows of each group attend to; None for causal attention without a past.

        A mask is [1, 1, n, C + n] after a copy of the shared tokens, and [B, 1, n, C + n] if each row has its own past.
        """
        groups, shared = self.groups, self.shared_length
        if self.copies_shared_prefix:
            masks = [self._causal(shared + n) for _, n in groups.shapes]
            return [mask[None, None, shared:] for mask in masks]
        parts = zip(groups.rows, groups.shapes, self.past_lengths, strict=True)
        row_masks: list[Tensor | None] = []
        for rows, (_, longest), past in parts:
            row_masks.append(self._row_mask(rows, longest, past) if past else None)
        return row_masks

    def _row_mask(self, rows: list[int], longest: int, past: int) -> Tensor:
        assert self.past is not None
        past_mask = self.past.mask[rows, None, :past]
        past_mask = past_mask.expand(-1, longest, -1)
        causal_mask = self._causal(longest).expand(len(rows), -1, -1)
        return torch.cat([past_mask, causal_mask], dim=2)[:, None]

    def _causal(self, size: int) -> Tensor:
        return torch.ones(size, size, dtype=torch.bool, device=self.flat_index.device).tril()

    def pack(self, rows: Tensor) -> Tensor:
        """Right-padded rows [B, M, H] -> [1, prefix + R, H]; the prefix comes from the first row."""
        rows_after_prefix = rows[:, self.prefix :]
        after_prefix = rows_after_prefix.flatten(0, 1)[self.flat_index]
        return torch.cat([rows[0, : self.prefix], after_prefix])[None]

    def columns(self, columns: Tensor) -> Tensor:
        """Columns [B, U] of the padded rows -> [1, B * U] columns of the packed sequence."""
        last = self.shape[1] - 1
        after_prefix = (columns - self.prefix).clamp(min=0).clamp(max=last)
        packed = self.prefix + self.source.gather(1, after_prefix)
        return torch.where(columns < self.prefix, columns, packed).flatten()[None]


def group_by_length(lengths: Sequence[int], max_groups: int = 3) -> list[list[int]]:
    """Divides rows into the groups for which attention over padded rows costs least.

    >>> group_by_length([10, 200, 11, 200])
    [[0, 2], [1, 3]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    count = len(order)
    even_cuts = {round(count * part / MAX_CUTS) for part in range(1, MAX_CUTS)}
    cuts = sorted(even_cuts - {0, len(order)})

    def cost(bounds: tuple[int, ...]) -> int:
        ends = (*bounds, len(order))
        total = 0
        for begin, end in pairwise((0, *ends)):
            longest = lengths[order[end - 1]]
            total += (end - begin) * longest**2 + GROUP_OVERHEAD
        return total

    choices = (bounds for n in range(max_groups) for bounds in combinations(cuts, n))
    best = min(choices, key=cost)
    ends = pairwise((0, *best, len(order)))
    return [order[begin:end] for begin, end in ends]


def pack(mask: Tensor, prefix: int, past: Past | None = None, collected: KeyValueStore | None = None) -> Packing:
    """The packing of right-padded rows [B, M] that share their first `prefix` tokens."""
    row_mask = mask[:, prefix:]
    flat_index = row_mask.flatten().nonzero()[:, 0]
    source = (row_mask.flatten().cumsum(0) - 1).clamp(min=0)
    source = source.view(row_mask.shape)
    return Packing(prefix, source, row_mask, flat_index, past, collected)


def shared_prefix_length(keys: Tensor, mask: Tensor) -> int:
    """Number of leading tokens that all rows share; 0 for a single row.

    At least one row has a token after the shared prefix.

    Args:
        keys: [B, M] numbers that are equal where rows have the same token.
        mask: [B, M] bool.
    """
    if len(keys) == 1:
        return 0
    has_same_key = (keys == keys[:1]).all(0)
    is_same = has_same_key & mask.all(0)  # [M]
    same = int(is_same.int().cumprod(0).sum())
    return min(same, int(mask.sum(1).max()) - 1)
