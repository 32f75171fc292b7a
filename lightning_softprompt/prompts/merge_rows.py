"""Prompts of different methods and lengths for the rows of one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_softprompt.core.types import Batch, SoftPrompt

Part = tuple[list[int], SoftPrompt]  # rows of the batch, and their prompt: one for all of them, or one each


def merge_prompts(parts: Sequence[Part], batch: Batch) -> SoftPrompt:
    """One prompt in which each row of the batch has what its own part gives it, and nothing else.

    Args:
        parts: Rows and their prompts; a row that is in none has no prompt.
        batch: All rows.

    Raises:
        ValueError: If a row is in two parts, a part brings soft tokens that enter at a middle layer, or two parts bring
            keys and values to different layers.
    """
    parts = [(own, prompt) for own, prompt in parts if own]
    rows = [row for own, _ in parts for row in own]
    if len(rows) != len(set(rows)):
        raise ValueError(
            f"each row takes one prompt, but rows {sorted({r for r in rows if rows.count(r) > 1})} have more"
        )
    if any(prompt.hidden for _, prompt in parts):
        raise ValueError("soft tokens that enter at a middle layer cannot be mixed with other prompts; run them apart")
    tokens, inside, blocks = _tokens(parts, len(batch))
    kinds = dict.fromkeys(kind for _, prompt in parts for kind in prompt.kv)
    injected = {kind: _pairs(kind, parts, len(batch)) for kind in kinds}
    return SoftPrompt(
        tokens=tokens,
        token_mask=inside,
        blocks=blocks,
        shift=_shift(parts, batch),
        kv={kind: pairs for kind, (pairs, _) in injected.items()},
        kv_mask={kind: inside for kind, (_, inside) in injected.items()},
    )


def _tokens(parts: Sequence[Part], batch: int) -> tuple[Tensor | None, Tensor | None, tuple[int, ...] | None]:
    """Soft tokens [B, P, H] block by block, each as long as the longest, and which of them [B, P] each row has."""
    with_tokens = [
        (rows, p.tokens, _mask_or_ones(p.tokens, p.token_mask), _blocks(p)) for rows, p in parts if p.tokens is not None
    ]
    if not with_tokens:
        return None, None, None
    slots = max(len(blocks) for *_, blocks in with_tokens)
    lengths = tuple(max((b[s] for *_, b in with_tokens if s < len(b)), default=0) for s in range(slots))
    filled, inside = [], []
    for rows, tokens, own, blocks in with_tokens:
        blocks = (*blocks, *[0] * (slots - len(blocks)))
        pieces = zip(tokens.split(blocks, 1), own.split(blocks, 1), blocks, lengths, strict=True)
        padded = [(pad(t, (0, 0, 0, most - n)), pad(i, (0, most - n))) for t, i, n, most in pieces]
        filled.append((rows, torch.cat([t for t, _ in padded], 1)))
        inside.append((rows, torch.cat([i for _, i in padded], 1)))
    return _scatter_rows(filled, batch), _scatter_rows(inside, batch), lengths


def _blocks(prompt: SoftPrompt) -> tuple[int, ...]:
    return prompt.blocks if prompt.blocks is not None else (prompt.tokens.shape[1],)  # type: ignore[union-attr]


def _mask_or_ones(tensor: Tensor, inside: Tensor | None) -> Tensor:
    """[B, P] which of [B, P, ...] is there."""
    return torch.ones(tensor.shape[:2], dtype=torch.bool, device=tensor.device) if inside is None else inside


def _shift(parts: Sequence[Part], batch: Batch) -> Tensor | None:
    """[B, T, H]."""
    shifts = [(rows, prompt.shift) for rows, prompt in parts if prompt.shift is not None]
    return _scatter_rows(shifts, len(batch)) if shifts else None


def _pairs(kind: str, parts: Sequence[Part], batch: int) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
    """Keys and values [B, N, P, D] by layer, and which of them [B, P] each row has."""
    given = [(rows, p.kv[kind], p.kv_mask.get(kind)) for rows, p in parts if kind in p.kv]
    if len({frozenset(layers) for _, layers, _ in given}) > 1:
        raise ValueError(f"prompts that bring {kind} keys to different layers cannot be mixed; run them apart")
    longest = max(key.shape[2] for _, layers, _ in given for key, _ in layers.values())

    def in_rows(layer: int, side: int) -> Tensor:
        sides = [(rows, layers[layer][side]) for rows, layers, _ in given]
        return _scatter_rows([(rows, pad(t, (0, 0, 0, longest - t.shape[2]))) for rows, t in sides], batch)

    pairs = {layer: (in_rows(layer, 0), in_rows(layer, 1)) for layer in given[0][1]}
    inside = [(rows, _mask_or_ones(next(iter(layers.values()))[0][:, 0], own)) for rows, layers, own in given]
    return pairs, _scatter_rows([(rows, pad(i, (0, longest - i.shape[1]))) for rows, i in inside], batch)


def _scatter_rows(parts: Sequence[tuple[list[int], Tensor]], batch: int) -> Tensor:
    """Tensors [1|rows, ...] of some rows each as one [B, ...], zero in rows that have none."""
    whole = parts[0][1].new_zeros(batch, *parts[0][1].shape[1:])
    for rows, tensor in parts:
        index = torch.tensor(rows, device=whole.device)
        whole = whole.index_copy(0, index, tensor.to(whole.dtype).expand(len(rows), *tensor.shape[1:]))
    return whole
