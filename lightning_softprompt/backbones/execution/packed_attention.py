"""The one attention function: rows of a packed row attend to the shared head and to themselves; nothing is expanded.

Each part is an ordinary attention with its log-sum-exp; the two are merged by it. In the backward pass each part is
given the merged output and log-sum-exp, which makes the gradients of both exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lightning_softprompt.backbones.execution.packing import Packing
from lightning_softprompt.backbones.insertion import key_values
from lightning_softprompt.backbones.insertion.key_values import NAME, attend_with_injected
from lightning_softprompt.backbones.kernels.attention import attend, attend_backward

CHANGES_SCORES = (*key_values.CHANGES_SCORES, "position_bias", "cross_bias")  # what some models want of attention
NEVER = 1e4  # a log-sum-exp that leaves padding no weight


class PackingUnsupportedError(RuntimeError):
    """A model asks something of its attention that packed rows do not do."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    """Transformers' attention: packed where there is a packing, else PyTorch's own with what is injected.

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
        return attend_with_injected(module, query, key, value, attention_mask, scaling=scaling, **options)
    refuse(options, packing)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in float32 after rotation
    layer = getattr(module, "layer_idx", None)
    if packing.kept is not None:
        packing.kept[_numbered(layer)] = key, value
    past = (None, None) if packing.past is None else packing.past.layers.get(_numbered(layer), (None, None))
    packing = packing.bare if past[0] is None else packing
    return PackedAttention.apply(query, key, value, *past, packing, scaling).transpose(1, 2), None


def _numbered(layer: int | None) -> int:
    if layer is None:
        raise PackingUnsupportedError("the model's layers do not know their numbers")
    return layer


def refuse(options: dict[str, Any], packing: Packing) -> None:
    """Refuses what changes the scores.

    Raises:
        PackingUnsupportedError: Naming it.
    """
    if wishes := [name for name in CHANGES_SCORES if options.get(name) is not None]:
        raise PackingUnsupportedError(f"the model's attention has {', '.join(wishes)}")
    window = options.get("sliding_window")
    before = 0 if packing.past is None else packing.past.inside.shape[1]
    if window is not None and before + packing.head + packing.rows[1] > window:
        raise PackingUnsupportedError(f"a row is longer than the model's sliding window of {window}")
    if options.get("dropout"):
        raise PackingUnsupportedError("the model's attention drops out")


class PackedAttention(torch.autograd.Function):
    """Attention of one packed row [1, heads, head + R, D] to itself and to its past.

    Rows see what is shared, then what is their own. A past that each row has to itself counts as its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
        packing: Packing,
        scale: float | None,
    ) -> Tensor:
        """The output, shaped as the query."""
        h = packing.head
        keys = Keys.of(key, value, past_key, past_value, packing)
        rows = zip(packing.own_masks, unpacked(query[:, :, h:], packing), *keys.own, strict=True)
        each = [attend(parts, mask is None, scale, mask) for mask, *parts in rows]
        out = repacked([o for o, _ in each], packing)
        lse = repacked([own[..., None] for _, own in each], packing)[..., 0]
        if keys.apart:
            seen, seen_lse = attend([folded(query[:, :, h:], key), *keys.shared], False, scale)
            out, lse = merged(out, lse, seen.reshape(out.shape), seen_lse.reshape(lse.shape))
        head: tuple[Tensor, ...] = ()
        if h:
            head = attend([query[:, :, :h], *keys.shared], packing.head_mask is None, scale, packing.head_mask)
        ctx.save_for_backward(query, key, value, past_key, past_value, out, lse, *head)
        ctx.packing, ctx.scale = packing, scale
        return torch.cat([*head[:1], out], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and past."""
        query, key, value, past_key, past_value, out, lse, *head = ctx.saved_tensors
        packing, scale, h = ctx.packing, ctx.scale, ctx.packing.head
        keys = Keys.of(key, value, past_key, past_value, packing)
        tensors = [unpacked(query[:, :, h:], packing), *keys.own, unpacked(out, packing)]
        padded = [own[..., 0] for own in unpacked(lse[..., None], packing, NEVER)]
        rows = zip(packing.own_masks, unpacked(grad[:, :, h:], packing, 0.0), *tensors, padded, strict=True)
        each = [attend_backward(g, parts, mask is None, scale, mask) for mask, g, *parts in rows]
        of_own = [list(of) for of in zip(*each, strict=True)]  # by query, key and value
        of_query = [repacked(of_own[0], packing)]
        of_shared = [torch.zeros_like(t) for t in keys.shared]
        if keys.apart:
            long, *rest = (folded(t, key) for t in (grad[:, :, h:], query[:, :, h:], out))
            parts = [rest[0], *keys.shared, rest[1], lse.reshape(rest[0].shape[:3])]
            of_seen, *of_shared = attend_backward(long, parts, False, scale)
            of_query = [of_query[0] + of_seen.reshape(of_query[0].shape)]
        if h:
            parts = [query[:, :, :h], *keys.shared, *head]
            of_head = attend_backward(grad[:, :, :h], parts, packing.head_mask is None, scale, packing.head_mask)
            of_query = [of_head[0], *of_query]
            of_shared = [a + b for a, b in zip(of_shared, of_head[1:], strict=True)]
        return torch.cat(of_query, dim=2), *keys.back(of_shared, of_own[1:]), None, None


@dataclass(frozen=True)
class Keys:
    """Keys and values as the parts of the attention take them.

    Args:
        shared: [1, N, C + head, D] each: what all rows see.
        own: [B, N, C + n, D] each by group of rows: what each row has to itself; behind a copy of `shared`, where that
            is short.
        packing: How the rows lie.
        past: Tokens of the past, C.
    """

    shared: list[Tensor]
    own: list[list[Tensor]]
    packing: Packing
    past: int

    @classmethod
    def of(
        cls, key: Tensor, value: Tensor, past_key: Tensor | None, past_value: Tensor | None, packing: Packing
    ) -> Keys:
        """From the keys and values of a packed row and of its past."""
        h = packing.head
        shared = [key[:, :, :h], value[:, :, :h]]
        own = [unpacked(t[:, :, h:], packing) for t in (key, value)]
        past = 0
        if past_key is not None and past_value is not None and packing.past is not None:
            before, past = [past_key.to(key.dtype), past_value.to(value.dtype)], past_key.shape[2]
            if packing.past.shared:
                shared = [torch.cat(pair, dim=2) for pair in zip(before, shared, strict=True)]
            else:
                own = [behind_their_past(rows, kept, packing) for rows, kept in zip(own, before, strict=True)]
        if packing.copied:
            own = [[behind_a_copy(rows, t) for rows in groups] for t, groups in zip(shared, own, strict=True)]
        return cls(shared, own, packing, past)

    @property
    def apart(self) -> bool:
        """Whether rows attend to what is shared apart from what is their own."""
        return bool(self.shared[0].shape[2]) and not self.packing.copied

    def back(self, shared: list[Tensor], own: list[list[Tensor]]) -> tuple[Tensor | None, ...]:
        """Gradients of key, value, past key and past value from those of the parts."""
        past: list[Tensor | None] = [None, None]
        if self.packing.copied:
            shared, own = self._without_copies(shared, own)
        if self.past and self.packing.past and self.packing.past.shared:
            past = [t[:, :, : self.past] for t in shared]
            shared = [t[:, :, self.past :] for t in shared]
        elif self.past:
            past = [self._of_past(groups) for groups in own]
            cuts = self.packing.own_pasts
            own = [[rows[:, :, cut:] for rows, cut in zip(groups, cuts, strict=True)] for groups in own]
        pairs = zip(shared, own, strict=True)
        return *(torch.cat([a, repacked(b, self.packing)], dim=2) for a, b in pairs), *past

    def _without_copies(self, shared: list[Tensor], own: list[list[Tensor]]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Gradients of copies added to those of what was copied."""
        c = self.shared[0].shape[2]
        for total, groups in zip(shared, own, strict=True):
            for rows in groups:
                total += rows[:, :, :c].sum(0)
        return shared, [[rows[:, :, c:] for rows in groups] for groups in own]

    def _of_past(self, groups: list[Tensor]) -> Tensor:
        """[B, N, C, D] of what stands before the rows of each group."""
        size = self.packing.rows[0], groups[0].shape[1], self.past, groups[0].shape[3]
        whole = groups[0].new_zeros(size)
        for rows, of, cut in zip(self.packing.groups.rows, groups, self.packing.own_pasts, strict=True):
            whole[rows, :, :cut] = of[:, :, :cut]
        return whole


def behind_their_past(groups: Sequence[Tensor], past: Tensor, packing: Packing) -> list[Tensor]:
    """[B, N, C + n, D] by group: what rows have of the past [B, N, C, D], then their own."""
    each = zip(packing.groups.rows, groups, packing.own_pasts, strict=True)
    whole = len(packing.groups.rows) == 1  # nothing is to be copied apart
    return [
        torch.cat([past[:, :, :cut] if whole else past[rows, :, :cut], own], dim=2) if cut else own
        for rows, own, cut in each
    ]


def behind_a_copy(rows: Tensor, shared: Tensor) -> Tensor:
    """[1, N, C, D] in front of each of [B, N, n, D]."""
    return torch.cat([shared.expand(len(rows), -1, -1, -1), rows], dim=2)


def folded(rows: Tensor, key: Tensor) -> Tensor:
    """Query heads of a key head side by side, as one long query: [1, heads, R, D] -> [1, N, heads / N * R, D]."""
    return rows.reshape(1, key.shape[1], -1, rows.shape[3])


def unpacked(rows: Tensor, packing: Packing, fill: float | None = None) -> list[Tensor]:
    """[1, heads, R, D] -> [B, heads, n, D] by group; behind a row's end stands `fill`, or anything that is finite."""
    groups = packing.groups
    by_token = rows.transpose(1, 2)[0].index_select(0, groups.source)  # [sum of B * n, heads, D]
    if fill is not None:
        by_token.index_fill_(0, groups.gaps, fill)
    parts = by_token.split([batch * longest for batch, longest in groups.shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, groups.shapes, strict=True)]


def repacked(rows: Sequence[Tensor], packing: Packing) -> Tensor:
    """[B, heads, n, D] by group -> [1, heads, R, D]."""
    by_token = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in rows])
    return by_token.index_select(0, packing.groups.places).transpose(0, 1)[None]


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attentions of the same queries to different keys as one: outputs [1, heads, R, D], log-sum-exps [1, heads, R]."""
    total = torch.logaddexp(lse, other_lse)
    weights = [(part - total).exp()[..., None].to(out.dtype) for part in (lse, other_lse)]
    return out * weights[0] + other * weights[1], total


def register() -> None:
    """Makes the function known to transformers under `NAME`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
