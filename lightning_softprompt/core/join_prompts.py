"""Joins the prompts of several methods into one prompt that contains all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from lightning_softprompt.core.types import KeysValues, SoftPrompt


def join_prompts(prompts: Mapping[str, SoftPrompt], rows: int) -> SoftPrompt:
    """Joins prompts: each row has the soft tokens, keys and values of all of them, in order.

    Soft tokens are concatenated at each slot, keys and values at each layer.

    Args:
        prompts: Prompts by the name of their method.
        rows: B, the number of rows.

    Raises:
        ValueError: If two prompts shift the embeddings or have keys and values in different layers, or if soft tokens
            enter at a middle layer, or are replaced at layers, together with another prompt.
    """
    parts = {name: prompt for name, prompt in prompts.items() if not _is_empty(prompt)}
    penalties = _sum_by_name([prompt.penalties for prompt in prompts.values()])
    logs = {f"{name}/{key}": value for name, prompt in prompts.items() for key, value in prompt.logs.items()}
    if len(parts) < 2:
        return replace(next(iter(parts.values()), SoftPrompt()), penalties=penalties, logs=logs)
    image = _join_images({name: prompt.image for name, prompt in parts.items() if prompt.image is not None}, rows)
    of_text = {name: prompt for name, prompt in parts.items() if not _is_empty(replace(prompt, image=None))}
    if len(of_text) < 2:
        return replace(next(iter(of_text.values()), SoftPrompt()), image=image, penalties=penalties, logs=logs)
    parts = of_text
    deep = [name for name, prompt in parts.items() if prompt.deep]
    if deep:
        raise ValueError(
            f"{deep[0]} replaces its soft tokens at layers, which cannot be joined with {_others(parts, deep[0])}"
        )
    late = [name for name, prompt in parts.items() if prompt.hidden]
    if late:
        raise ValueError(
            f"{late[0]} inserts soft tokens at a middle layer, which cannot be joined with {_others(parts, late[0])}"
        )
    shifting = [name for name, prompt in parts.items() if prompt.shift is not None]
    if len(shifting) > 1:
        raise ValueError(f"{' and '.join(shifting)} both shift the embeddings of the input; use one of them")
    tokens, token_mask, blocks = _join_tokens(list(parts.values()), rows)
    kv, kv_mask = _join_key_values(parts, rows)
    return SoftPrompt(
        tokens=tokens,
        blocks=blocks,
        token_mask=token_mask,
        shift=parts[shifting[0]].shift if shifting else None,
        kv=kv,
        kv_mask=kv_mask,
        image=image,
        depends_on_image=any(prompt.depends_on_image for prompt in parts.values()),
        penalties=penalties,
        logs=logs,
    )


def _join_images(prompts: Mapping[str, SoftPrompt], rows: int) -> SoftPrompt | None:
    """Joins the prompts of the image tower; None if there are none."""
    return join_prompts(prompts, rows) if prompts else None


def _is_empty(prompt: SoftPrompt) -> bool:
    has_layers = prompt.kv or prompt.hidden or prompt.deep
    return prompt.tokens is None and prompt.shift is None and not has_layers and prompt.image is None


def _others(names: Mapping[str, SoftPrompt], name: str) -> str:
    return ", ".join(other for other in names if other != name)


def _sum_by_name(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the sum of scalars that have the same name."""
    sums: dict[str, Tensor] = {}
    for part in values:
        for name, value in part.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _join_tokens(
    prompts: Sequence[SoftPrompt], rows: int
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...] | None]:
    """Concatenates soft tokens slot by slot.

    Returns:
        Soft tokens [B|1, P, H], the mask [B, P] of those that each row has, and their number at each slot.
    """
    with_tokens = [(prompt.tokens, prompt) for prompt in prompts if prompt.tokens is not None]
    if not with_tokens:
        return None, None, None
    token_parts, mask_parts = [], []
    has_mask = any(prompt.token_mask is not None for _, prompt in with_tokens)
    for tokens, prompt in with_tokens:
        blocks = (tokens.shape[1],) if prompt.blocks is None else prompt.blocks
        token_parts.append(tokens.split(blocks, 1))
        if has_mask:
            mask_parts.append(_mask_of_rows(tokens, prompt.token_mask, rows).split(blocks, 1))
    slots = list(zip_longest(*token_parts))
    lengths = tuple(sum(block.shape[1] for block in slot if block is not None) for slot in slots)
    tokens = _concatenate([block for slot in slots for block in slot if block is not None], rows, 1)
    if not has_mask:
        return tokens, None, lengths
    masks = [block for slot in zip_longest(*mask_parts) for block in slot if block is not None]
    return tokens, torch.cat(masks, 1), lengths


def _join_key_values(parts: Mapping[str, SoftPrompt], rows: int) -> tuple[KeysValues, dict[str, Tensor]]:
    """Concatenates keys and values [B|1, N, P, D] of each kind of attention at each layer, and their masks."""
    joined: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    masks: dict[str, Tensor] = {}
    for kind in dict.fromkeys(kind for prompt in parts.values() for kind in prompt.kv):
        with_kind = {name: prompt for name, prompt in parts.items() if kind in prompt.kv}
        layers = {name: sorted(prompt.kv[kind]) for name, prompt in with_kind.items()}
        first = next(iter(layers.values()))
        if any(other != first for other in layers.values()):
            raise ValueError(f"the methods have {kind} keys in different layers, which cannot be joined: {layers}")
        pairs = [prompt.kv[kind] for prompt in with_kind.values()]
        joined[kind] = {}
        for layer in first:
            keys = _concatenate([part[layer][0] for part in pairs], rows, 2)
            values = _concatenate([part[layer][1] for part in pairs], rows, 2)
            joined[kind][layer] = keys, values
        if any(kind in prompt.kv_mask for prompt in with_kind.values()):
            kind_masks = []
            for prompt, part in zip(with_kind.values(), pairs, strict=True):
                positions = part[first[0]][0][:, 0]  # [B|1, P, D]
                kind_masks.append(_mask_of_rows(positions, prompt.kv_mask.get(kind), rows))
            masks[kind] = torch.cat(kind_masks, 1)
    return joined, masks


def _mask_of_rows(tensor: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """Returns the mask [B, P] of positions of [B|1, P, ...]; all of them if there is no mask."""
    if mask is None:
        return torch.ones(rows, tensor.shape[1], dtype=torch.bool, device=tensor.device)
    return mask.expand(rows, -1)


def _concatenate(tensors: Sequence[Tensor], rows: int, axis: int) -> Tensor:
    """Concatenates tensors [B|1, ...]; the first axis of the result is 1 if it is 1 in all of them."""
    if all(len(tensor) == 1 for tensor in tensors):
        return torch.cat(list(tensors), axis)
    return torch.cat([tensor.expand(rows, *tensor.shape[1:]) for tensor in tensors], axis)
