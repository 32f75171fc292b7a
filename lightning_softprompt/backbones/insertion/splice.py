"""Soft blocks between embedded tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spliced:
    """Rows with their soft blocks in place and their padding on one side.

    Args:
        embeds: [B, M, H] with M the longest row, soft tokens included.
        mask: [B, M] bool.
        columns: [B, T] where each input token went.
        order: [B, M] where each token came from: soft tokens count from 0, input tokens from P.
    """

    embeds: Tensor
    mask: Tensor
    columns: Tensor
    order: Tensor


def ids_of(rows: Spliced, input_ids: Tensor, placeholder: int, pad_id: int) -> Tensor:
    """[B, M] token ids of spliced rows: placeholders on soft tokens, padding where a row has ended."""
    width = max(rows.mask.shape[1], int(rows.columns.max()) + 1)
    ids = input_ids.new_full((len(input_ids), width), placeholder).scatter(1, rows.columns, input_ids)
    return ids[:, : rows.mask.shape[1]].where(rows.mask, pad_id)


def splice(
    embeds: Tensor,
    mask: Tensor,
    slots: Tensor,
    tokens: Tensor | None = None,
    blocks: tuple[int, ...] | None = None,
    token_mask: Tensor | None = None,
) -> Spliced:
    """Puts soft block s before token `slots[:, s]`, and all padding at the end.

    Whichever side the batch was padded on, real tokens come out side by side: token number n of a row is at position n,
    which is why a row's logits depend neither on padding nor on the rest of the batch.

    Args:
        embeds: [B, T, H].
        mask: [B, T] bool.
        slots: [B, S].
        tokens: [B|1, P, H] soft tokens, in any precision.
        blocks: Lengths of the soft blocks, one a slot; None puts all at the first slot.
        token_mask: [B, P] bool, False on soft tokens that a row does not have.

    Raises:
        ValueError: If there are more soft blocks than slots.
    """
    batch, length = mask.shape
    soft = embeds.new_zeros(batch, 0, embeds.shape[2]) if tokens is None else tokens.to(embeds).expand(batch, -1, -1)
    places = _places(slots, soft.shape[1], blocks)  # [B, P]
    keep = torch.cat([mask.new_ones(places.shape) if token_mask is None else token_mask, mask], dim=1)  # [B, P+T]
    rank = torch.cat([2 * places, 2 * torch.arange(length, device=mask.device).expand(batch, -1) + 1], dim=1)
    rank = rank.masked_fill(~keep, 2 * length + 2)
    order = rank.argsort(dim=1, stable=True)  # [B, P+T]
    columns = order.argsort(dim=1)[:, soft.shape[1] :]  # [B, T]
    kept = keep.gather(1, order)
    rows = torch.cat([soft, embeds], dim=1).gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
    longest = int(kept.sum(1).max())
    return Spliced(rows[:, :longest], kept[:, :longest], columns, order[:, :longest])


def _places(slots: Tensor, length: int, blocks: tuple[int, ...] | None) -> Tensor:
    """The token that each soft token stands before: [B, S] -> [B, P]."""
    blocks = (length,) if blocks is None else blocks
    if len(blocks) > slots.shape[1]:
        raise ValueError(
            f"{len(blocks)} soft blocks want as many slots, but the template has {slots.shape[1]} {{soft}}"
        )
    lengths = torch.tensor(blocks, device=slots.device)
    return slots[:, : len(blocks)].repeat_interleave(lengths, dim=1)
