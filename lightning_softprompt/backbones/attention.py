"""The one attention function: rows of a packed row attend to the shared head and to themselves; nothing is expanded.

Each part is an ordinary attention with its log-sum-exp; the two are merged by it. In the backward pass each part is
given the merged output and log-sum-exp, which makes the gradients of both exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_softprompt.backbones.packing import Packing

NAME = "softprompt"
CHANGES_SCORES = ("softcap", "s_aux", "position_bias", "cross_bias")  # what some models want of their attention
NEVER = 1e4  # a log-sum-exp that leaves padding no weight


class PackingUnsupportedError(RuntimeError):
    """A model asks something of its attention that packed rows do not do."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention: packed where there is a packing, else PyTorch's own.

    Args:
        module: The layer.
        query: [B, heads, L, D].
        key: [B, N, L, D].
        value: [B, N, L, D].
        attention_mask: As transformers made it; packed rows have none.
        scaling: Of the scores.
        packing: How the rows lie.
        options: Further wishes of the model.

    Raises:
        PackingUnsupportedError: If the model wishes what packed rows do not do.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    refuse(options, packing)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in float32 after rotation
    return PackedAttention.apply(query, key, value, packing, scaling).transpose(1, 2), None


def refuse(options: dict[str, Any], packing: Packing) -> None:
    """Refuses what changes the scores.

    Raises:
        PackingUnsupportedError: Naming it.
    """
    if wishes := [name for name in CHANGES_SCORES if options.get(name) is not None]:
        raise PackingUnsupportedError(f"the model's attention has {', '.join(wishes)}")
    window = options.get("sliding_window")
    if window is not None and packing.head + packing.rows[1] > window:
        raise PackingUnsupportedError(f"a row is longer than the model's sliding window of {window}")
    if options.get("dropout"):
        raise PackingUnsupportedError("the model's attention drops out")


class PackedAttention(torch.autograd.Function):
    """Attention of one packed row [1, heads, head + R, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None) -> Tensor:
        """The output, shaped as the query."""
        h = packing.head
        parts: list[Tensor] = []
        head = [t[:, :, :h] for t in (query, key, value)]
        own = [unpacked(t[:, :, h:], packing) for t in (query, key, value)]
        out, lse = flash(own, causal=True, scale=scale)
        out, lse = repacked(out, packing), repacked(lse[..., None], packing)[..., 0]
        if h:
            head_out, head_lse = flash(head, causal=True, scale=scale)
            seen, seen_lse = flash([folded(query[:, :, h:], key), *head[1:]], causal=False, scale=scale)
            out, lse = merged(out, lse, seen.reshape(out.shape), seen_lse.reshape(lse.shape))
            parts = [head_out, head_lse]
        ctx.save_for_backward(query, key, value, out, lse, *parts)
        ctx.packing, ctx.scale = packing, scale
        return torch.cat([*parts[:1], out], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, lse, *parts = ctx.saved_tensors
        packing, scale, h = ctx.packing, ctx.scale, ctx.packing.head
        own = [unpacked(t, packing) for t in (grad[:, :, h:], query[:, :, h:], key[:, :, h:], value[:, :, h:], out)]
        own_lse = unpacked(lse[..., None], packing, NEVER)[..., 0]
        own_grads = [repacked(g, packing) for g in flash_backward([*own, own_lse], causal=True, scale=scale)]
        if not h:
            return *own_grads, None, None
        head = [t[:, :, :h] for t in (query, key, value)]
        head_grads = flash_backward([grad[:, :, :h], *head, *parts], causal=True, scale=scale)
        rows = [folded(t, key) for t in (grad[:, :, h:], query[:, :, h:], out)]
        lse = lse.reshape(rows[1].shape[:3])
        seen = flash_backward([rows[0], rows[1], *head[1:], rows[2], lse], causal=False, scale=scale)
        own_grads[0] = own_grads[0] + seen[0].reshape(own_grads[0].shape)
        shared = [head_grads[0], head_grads[1] + seen[1], head_grads[2] + seen[2]]
        return *(torch.cat(pair, dim=2) for pair in zip(shared, own_grads, strict=True)), None, None


def folded(rows: Tensor, key: Tensor) -> Tensor:
    """Query heads of a key head side by side, as one long query: [1, heads, R, D] -> [1, N, heads / N * R, D]."""
    return rows.reshape(1, key.shape[1], -1, rows.shape[3])


def unpacked(rows: Tensor, packing: Packing, fill: float = 0.0) -> Tensor:
    """[1, heads, R, D] -> [B, heads, n, D], right-padded."""
    batch, longest = packing.rows
    padded = rows.new_full((rows.shape[1], batch * longest, rows.shape[3]), fill)
    padded[:, packing.places] = rows[0]
    return padded.unflatten(1, (batch, longest)).transpose(0, 1)


def repacked(rows: Tensor, packing: Packing) -> Tensor:
    """[B, heads, n, D] -> [1, heads, R, D]."""
    return rows.transpose(0, 1).flatten(1, 2)[:, packing.places][None]


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attentions of the same queries to different keys as one: outputs [1, heads, R, D], log-sum-exps [1, heads, R]."""
    total = torch.logaddexp(lse, other_lse)
    weights = [(part - total).exp()[..., None].to(out.dtype) for part in (lse, other_lse)]
    return out * weights[0] + other * weights[1], total


def flash(parts: Sequence[Tensor], causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention of query, key and value, and its log-sum-exp; key heads may be fewer than query heads."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, causal, scale=scale)
    return out, lse


def flash_backward(parts: Sequence[Tensor], causal: bool, scale: float | None) -> list[Tensor]:
    """Gradients of query, key and value, from those of the output and from what `flash` took and gave."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return list(backward(*parts, 0.0, causal, scale=scale))


def register() -> None:
    """Makes the function known to transformers under `NAME`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
