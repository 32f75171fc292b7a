"""Inserts soft blocks between the embeddings of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_softprompt.core.types import Batch


@dataclass(frozen=True)
class Spliced:
    """Rows with their soft blocks in place and their padding on one side.

    Args:
        embeds: [B, M, H], where M is the length of the longest row, including soft tokens.
        mask: [B, M] bool.
        columns: [B, T] the column of each input token.
        order: [B, M] the origin of each token: soft tokens count from 0, input tokens from P.
    """

    embeds: Tensor
    mask: Tensor
    columns: Tensor
    order: Tensor


def ids_of(rows: Spliced, input_ids: Tensor, placeholder: int, pad_id: int) -> Tensor:
    """Returns the token ids [B, M] of spliced rows, with placeholders on soft tokens and padding at the end."""
    length = rows.mask.shape[1]
    width = max(length, int(rows.columns.max()) + 1)
    placeholders = input_ids.new_full((len(input_ids), width), placeholder)
    ids = placeholders.scatter(1, rows.columns, input_ids)
    return ids[:, :length].where(rows.mask, pad_id)


def splice(
    embeds: Tensor,
    mask: Tensor,
    slots: Tensor,
    tokens: Tensor | None = None,
    blocks: tuple[int, ...] | None = None,
    token_mask: Tensor | None = None,
) -> Spliced:
    """Inserts soft block s before token `slots[:, s]`, and moves all padding to the end.

    Whichever side the batch was padded on, token n of a row is then at position n. Therefore a row's logits depend
    neither on padding nor on the rest of the batch.

    Args:
        embeds: [B, T, H].
        mask: [B, T] bool.
        slots: [B, S].
        tokens: [B|1, P, H] soft tokens, in any precision.
        blocks: Lengths of the soft blocks, one for each slot; None inserts all soft tokens at the first slot.
        token_mask: [B, P] bool, False on soft tokens that a row does not have.

    Raises:
        ValueError: If there are more soft blocks than slots.
    """
    batch, length, width = embeds.shape
    soft = embeds.new_zeros(batch, 0, width) if tokens is None else tokens.to(embeds).expand(batch, -1, -1)
    next_token = _next_token(slots, soft.shape[1], blocks)  # [B, P]
    soft_mask = mask.new_ones(next_token.shape) if token_mask is None else token_mask
    is_real = torch.cat([soft_mask, mask], dim=1)  # [B, P+T]
    # Even ranks place soft tokens before the input token with the next odd rank; padding has the largest rank.
    input_rank = 2 * torch.arange(length, device=mask.device) + 1
    rank = torch.cat([2 * next_token, input_rank.expand(batch, -1)], dim=1)
    rank = rank.masked_fill(~is_real, 2 * length + 2)
    order = rank.argsort(dim=1, stable=True)  # [B, P+T]
    columns = order.argsort(dim=1)[:, soft.shape[1] :]  # [B, T]
    row_mask = is_real.gather(1, order)
    index = order[..., None].expand(-1, -1, width)
    rows = torch.cat([soft, embeds], dim=1).gather(1, index)
    longest = int(row_mask.sum(1).max())
    return Spliced(rows[:, :longest], row_mask[:, :longest], columns, order[:, :longest])


def _next_token(slots: Tensor, length: int, blocks: tuple[int, ...] | None) -> Tensor:
    """Returns the index [B, P] of the input token that follows each soft token, from slots [B, S]."""
    blocks = (length,) if blocks is None else blocks
    if len(blocks) > slots.shape[1]:
        raise ValueError(
            f"{len(blocks)} soft blocks require as many slots, but the template has {slots.shape[1]} {{soft}}"
        )
    lengths = torch.tensor(blocks, device=slots.device)
    return slots[:, : len(blocks)].repeat_interleave(lengths, dim=1)


def answer_positions(batch: Batch) -> Tensor:
    """[B, U] positions of the answer's tokens in `input_ids`; arbitrary if an answer is shorter than U."""
    answer = batch.mask & ~batch.source
    count = batch.targets.shape[1]
    return (~answer).int().argsort(dim=1, stable=True)[:, :count]
