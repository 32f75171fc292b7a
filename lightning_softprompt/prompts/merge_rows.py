"""Merges prompts of different methods and lengths into one prompt for the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_softprompt.core.types import Batch, SoftPrompt

Part = tuple[list[int], SoftPrompt]  # rows of the batch, and their prompt: one for all of them, or one each


def merge_prompts(parts: Sequence[Part], batch: Batch) -> SoftPrompt:
    """Merges the prompts of groups of rows; the result for a row depends only on the prompt of its group.

    Args:
        parts: Rows and their prompts; a row that is in no part has no prompt.
        batch: All rows.

    Raises:
        ValueError: If a row is in two parts, a part has soft tokens at a middle layer, or two parts have keys and
            values in different layers.
    """
    parts = [(rows, prompt) for rows, prompt in parts if rows]
    all_rows = [row for rows, _ in parts for row in rows]
    repeated = sorted({row for row in all_rows if all_rows.count(row) > 1})
    if repeated:
        raise ValueError(f"each row takes one prompt, but rows {repeated} have more")
    if any(prompt.hidden for _, prompt in parts):
        raise ValueError("soft tokens at a middle layer cannot be merged with other prompts; run them separately")
    tokens, token_mask, blocks = _merge_tokens(parts, len(batch))
    kinds = dict.fromkeys(kind for _, prompt in parts for kind in prompt.kv)
    merged = {kind: _merge_key_values(kind, parts, len(batch)) for kind in kinds}
    return SoftPrompt(
        tokens=tokens,
        token_mask=token_mask,
        blocks=blocks,
        shift=_merge_shifts(parts, batch),
        kv={kind: pairs for kind, (pairs, _) in merged.items()},
        kv_mask={kind: mask for kind, (_, mask) in merged.items()},
    )


def _merge_tokens(parts: Sequence[Part], batch: int) -> tuple[Tensor | None, Tensor | None, tuple[int, ...] | None]:
    """Merges soft tokens block by block, each padded to the longest.

    Returns:
        Soft tokens [B, P, H], the mask [B, P] of those that each row has, and the lengths of the blocks.
    """
    with_tokens = [(rows, prompt.tokens, prompt) for rows, prompt in parts if prompt.tokens is not None]
    if not with_tokens:
        return None, None, None
    unpadded = [_block_lengths(prompt) for *_, prompt in with_tokens]
    num_slots = max(len(blocks) for blocks in unpadded)
    blocks_of_parts = []
    for blocks in unpadded:
        missing_slots = num_slots - len(blocks)
        blocks_of_parts.append((*blocks, *[0] * missing_slots))
    longest = tuple(max(lengths) for lengths in zip(*blocks_of_parts, strict=True))
    merged_tokens, merged_masks = [], []
    for (rows, tokens, prompt), blocks in zip(with_tokens, blocks_of_parts, strict=True):
        mask = _mask_or_ones(tokens, prompt.token_mask)
        padded_tokens, padded_masks = [], []
        token_blocks, mask_blocks = tokens.split(blocks, 1), mask.split(blocks, 1)
        for block, block_mask, size in zip(token_blocks, mask_blocks, longest, strict=True):
            missing = size - block.shape[1]
            padded_tokens.append(pad(block, (0, 0, 0, missing)))
            padded_masks.append(pad(block_mask, (0, missing)))
        merged_tokens.append((rows, torch.cat(padded_tokens, 1)))
        merged_masks.append((rows, torch.cat(padded_masks, 1)))
    return _scatter_rows(merged_tokens, batch), _scatter_rows(merged_masks, batch), longest


def _block_lengths(prompt: SoftPrompt) -> tuple[int, ...]:
    return prompt.blocks if prompt.blocks is not None else (prompt.tokens.shape[1],)  # type: ignore[union-attr]


def _mask_or_ones(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The mask [B, P] of positions of [B, P, ...]; all of them if there is no mask."""
    if mask is not None:
        return mask
    return torch.ones(tensor.shape[:2], dtype=torch.bool, device=tensor.device)


def _merge_shifts(parts: Sequence[Part], batch: Batch) -> Tensor | None:
    """Merges the shifts of embeddings to [B, T, H]."""
    shifts = [(rows, prompt.shift) for rows, prompt in parts if prompt.shift is not None]
    return _scatter_rows(shifts, len(batch)) if shifts else None


def _merge_key_values(kind: str, parts: Sequence[Part], batch: int) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
    """Merges keys and values [B, N, P, D] by layer; also returns the mask [B, P] of those that each row has."""
    with_kind = []
    for rows, prompt in parts:
        if kind in prompt.kv:
            with_kind.append((rows, prompt.kv[kind], prompt.kv_mask.get(kind)))
    if len({frozenset(layers) for _, layers, _ in with_kind}) > 1:
        raise ValueError(f"prompts with {kind} keys in different layers cannot be merged; run them separately")
    keys = [key for _, layers, _ in with_kind for key, _ in layers.values()]
    longest = max(key.shape[2] for key in keys)

    def merge_side(layer: int, side: int) -> Tensor:
        padded = []
        for rows, layers, _ in with_kind:
            tensor = layers[layer][side]
            missing = longest - tensor.shape[2]
            padded.append((rows, pad(tensor, (0, 0, 0, missing))))
        return _scatter_rows(padded, batch)

    _, layers, _ = with_kind[0]
    pairs = {layer: (merge_side(layer, 0), merge_side(layer, 1)) for layer in layers}
    masks = []
    for rows, layers, kv_mask in with_kind:
        key, _ = next(iter(layers.values()))
        mask = _mask_or_ones(key[:, 0], kv_mask)
        missing = longest - mask.shape[1]
        masks.append((rows, pad(mask, (0, missing))))
    return pairs, _scatter_rows(masks, batch)


def _scatter_rows(parts: Sequence[tuple[list[int], Tensor]], batch: int) -> Tensor:
    """Scatters tensors [1|rows, ...] of groups of rows into one tensor [B, ...], with zeros for all other rows."""
    _, first = parts[0]
    merged = first.new_zeros(batch, *first.shape[1:])
    for rows, tensor in parts:
        index = torch.tensor(rows, device=merged.device)
        of_dtype = tensor.to(merged.dtype)
        expanded = of_dtype.expand(len(rows), *tensor.shape[1:])
        merged = merged.index_copy(0, index, expanded)
    return merged
