"""The attention function of packed sequences: rows attend to the shared prefix and to themselves, without copies of it.

Each of the two parts is an ordinary attention that also returns its log-sum-exp, by which the outputs are merged. In
the backward pass, each part receives the merged output and log-sum-exp, which makes its gradients exact.
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
from lightning_softprompt.backbones.insertion.attention_probe import PROBE
from lightning_softprompt.backbones.insertion.key_values import NAME, attend_with_injected
from lightning_softprompt.backbones.kernels.attention import attend, attend_backward

CHANGES_SCORES = (*key_values.CHANGES_SCORES, "position_bias", "cross_bias")  # options that change attention scores
NEVER = 1e4  # a log-sum-exp that gives padding no weight


class PackingUnsupportedError(RuntimeError):
    """A model whose attention has an option that packed sequences do not support."""


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
    """An attention function of transformers: packed if there is a packing, else PyTorch's with injected keys.

    Args:
        module: The layer.
        query: [B, heads, L, D].
        key: [B, N, L, D].
        value: [B, N, L, D].
        attention_mask: The mask that transformers created; packed sequences have none.
        scaling: Factor of the scores.
        packing: The layout of the packed sequence.
        options: Further options that the model passes.

    Raises:
        PackingUnsupportedError: If packed sequences do not support an option.
    """
    if packing is None:
        return attend_with_injected(module, query, key, value, attention_mask, scaling=scaling, **options)
    refuse_unsupported_options(options, packing)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in float32 after rotation
    layer = getattr(module, "layer_idx", None)
    if packing.collected is not None:
        packing.collected[_layer_number(layer)] = key, value
    past_key = past_value = None
    if packing.past is not None:
        past_key, past_value = packing.past.layers.get(_layer_number(layer), (None, None))
    if past_key is None:
        packing = packing.without_past
    out = PackedAttention.apply(query, key, value, past_key, past_value, packing, scaling)
    if (probe := PROBE.get()) is not None:

        def attend_to(values: Tensor, past_values: Tensor | None) -> Tensor:
            arguments = (query, key, values, past_key, past_values, packing, scaling)
            return PackedAttention.apply(*arguments).transpose(1, 2)

        probe.add(module, value, past_value, attend_to)
    return out.transpose(1, 2), None


def _layer_number(layer: int | None) -> int:
    if layer is None:
        raise PackingUnsupportedError("the model's layers have no layer_idx")
    return layer


def refuse_unsupported_options(options: dict[str, Any], packing: Packing) -> None:
    """Refuses options that change the scores.

    Raises:
        PackingUnsupportedError: Naming the option.
    """
    if unsupported := [name for name in CHANGES_SCORES if options.get(name) is not None]:
        raise PackingUnsupportedError(f"the model's attention has {', '.join(unsupported)}")
    window = options.get("sliding_window")
    past = 0 if packing.past is None else packing.past.size
    longest = past + packing.prefix + packing.shape[1]
    if window is not None and longest > window:
        raise PackingUnsupportedError(f"a row is longer than the model's sliding window of {window}")
    if options.get("dropout"):
        raise PackingUnsupportedError("the model's attention has dropout")


class PackedAttention(torch.autograd.Function):
    """Attention of one packed sequence [1, heads, prefix + R, D] to itself and to its past.

    Each row attends to the shared tokens and to itself. If every row has a separate past, the past is part of the row.
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
        """The output, shaped like the query."""
        prefix = packing.prefix
        keys = Keys.of(key, value, past_key, past_value, packing)
        row_query = query[:, :, prefix:]
        groups = zip(packing.row_masks, split_groups(row_query, packing), *keys.by_group, strict=True)
        results = [attend(parts, mask is None, scale, mask) for mask, *parts in groups]
        out = join_groups([group_out for group_out, _ in results], packing)
        lse_columns = [group_lse[..., None] for _, group_lse in results]
        lse = join_groups(lse_columns, packing)[..., 0]
        if keys.attends_separately:
            shared_result = attend([fold_heads(row_query, key), *keys.shared], False, scale)
            shared_out, shared_lse = shared_result
            shared_out = shared_out.reshape(out.shape)
            shared_lse = shared_lse.reshape(lse.shape)
            out, lse = merge_attention(out, lse, shared_out, shared_lse)
        prefix_result: tuple[Tensor, ...] = ()
        if prefix:
            mask = packing.prefix_mask
            prefix_query = query[:, :, :prefix]
            prefix_result = attend([prefix_query, *keys.shared], mask is None, scale, mask)
        ctx.save_for_backward(query, key, value, past_key, past_value, out, lse, *prefix_result)
        ctx.packing, ctx.scale = packing, scale
        return torch.cat([*prefix_result[:1], out], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and past."""
        query, key, value, past_key, past_value, out, lse, *prefix_result = ctx.saved_tensors
        packing, scale, prefix = ctx.packing, ctx.scale, ctx.packing.prefix
        keys = Keys.of(key, value, past_key, past_value, packing)
        row_query = query[:, :, prefix:]
        row_grad = grad[:, :, prefix:]
        tensors = [split_groups(row_query, packing), *keys.by_group, split_groups(out, packing)]
        lse_columns = split_groups(lse[..., None], packing, NEVER)
        group_lse = [tensor[..., 0] for tensor in lse_columns]
        group_grad = split_groups(row_grad, packing, 0.0)
        groups = zip(packing.row_masks, group_grad, *tensors, group_lse, strict=True)
        results = [attend_backward(g, parts, mask is None, scale, mask) for mask, g, *parts in groups]
        group_grads = [list(gradients) for gradients in zip(*results, strict=True)]  # by query, key and value
        query_grads = [join_groups(group_grads[0], packing)]
        shared_grads = [torch.zeros_like(tensor) for tensor in keys.shared]
        if keys.attends_separately:
            folded_grad, folded_query, folded_out = (fold_heads(t, key) for t in (row_grad, row_query, out))
            folded_lse = lse.reshape(folded_query.shape[:3])
            parts = [folded_query, *keys.shared, folded_out, folded_lse]
            from_shared, *shared_grads = attend_backward(folded_grad, parts, False, scale)
            query_grads = [query_grads[0] + from_shared.reshape(query_grads[0].shape)]
        if prefix:
            mask = packing.prefix_mask
            parts = [query[:, :, :prefix], *keys.shared, *prefix_result]
            prefix_grad = grad[:, :, :prefix]
            prefix_grads = attend_backward(prefix_grad, parts, mask is None, scale, mask)
            query_grads = [prefix_grads[0], *query_grads]
            pairs = zip(shared_grads, prefix_grads[1:], strict=True)
            shared_grads = [a + b for a, b in pairs]
        query_grad = torch.cat(query_grads, dim=2)
        return query_grad, *keys.backward(shared_grads, group_grads[1:]), None, None


@dataclass(frozen=True)
class Keys:
    """Keys and values, arranged for the parts of the attention.

    Args:
        shared: Key and value [1, N, C + prefix, D] that all rows attend to.
        by_group: Key and value [B, N, C + n, D] of each group of rows, which only the row itself attends to. If the
            shared tokens are few, each row begins with a copy of them.
        packing: The layout of the packed sequence.
        past: C, tokens of the past.
    """

    shared: list[Tensor]
    by_group: list[list[Tensor]]
    packing: Packing
    past: int

    @classmethod
    def of(
        cls, key: Tensor, value: Tensor, past_key: Tensor | None, past_value: Tensor | None, packing: Packing
    ) -> Keys:
        """Arranges the keys and values of a packed sequence and of its past."""
        prefix = packing.prefix
        shared = [tensor[:, :, :prefix] for tensor in (key, value)]
        row_parts = [tensor[:, :, prefix:] for tensor in (key, value)]
        by_group = [split_groups(tensor, packing) for tensor in row_parts]
        past = 0
        if past_key is not None and past_value is not None and packing.past is not None:
            pasts = [past_key.to(key.dtype), past_value.to(value.dtype)]
            past = past_key.shape[2]
            if packing.past.is_shared:
                shared = [torch.cat(pair, dim=2) for pair in zip(pasts, shared, strict=True)]
            else:
                groups_and_pasts = zip(by_group, pasts, strict=True)
                by_group = [prepend_pasts(groups, tensor, packing) for groups, tensor in groups_and_pasts]
        if packing.copies_shared_prefix:
            pairs = zip(shared, by_group, strict=True)
            by_group = [[prepend_copy(rows, tensor) for rows in groups] for tensor, groups in pairs]
        return cls(shared, by_group, packing, past)

    @property
    def attends_separately(self) -> bool:
        """Whether rows attend to the shared tokens in a separate attention."""
        return bool(self.shared[0].shape[2]) and not self.packing.copies_shared_prefix

    def backward(self, shared: list[Tensor], by_group: list[list[Tensor]]) -> tuple[Tensor | None, ...]:
        """Gradients of key, value, past key and past value from the gradients of `shared` and `by_group`."""
        past: list[Tensor | None] = [None, None]
        if self.packing.copies_shared_prefix:
            shared, by_group = self._add_copies(shared, by_group)
        if self.past and self.packing.past and self.packing.past.is_shared:
            past = [tensor[:, :, : self.past] for tensor in shared]
            shared = [tensor[:, :, self.past :] for tensor in shared]
        elif self.past:
            past = [self._join_pasts(groups) for groups in by_group]
            lengths = self.packing.past_lengths
            by_group = [_drop_first(groups, lengths) for groups in by_group]
        key_and_value = []
        for tensor, groups in zip(shared, by_group, strict=True):
            joined = join_groups(groups, self.packing)
            key_and_value.append(torch.cat([tensor, joined], dim=2))
        return *key_and_value, *past

    def _add_copies(
        self, shared: list[Tensor], by_group: list[list[Tensor]]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Adds the gradients of the copies to the gradients of the shared tokens, and removes them from the rows."""
        length = self.shared[0].shape[2]
        for total, groups in zip(shared, by_group, strict=True):
            for rows in groups:
                total += rows[:, :, :length].sum(0)
        lengths = (length,) * len(by_group[0])
        return shared, [_drop_first(groups, lengths) for groups in by_group]

    def _join_pasts(self, groups: list[Tensor]) -> Tensor:
        """[B, N, C, D] of the pasts at the beginning of each group's rows."""
        _, heads, _, width = groups[0].shape
        size = self.packing.shape[0], heads, self.past, width
        whole = groups[0].new_zeros(size)
        parts = zip(self.packing.groups.rows, groups, self.packing.past_lengths, strict=True)
        for rows, tensor, length in parts:
            whole[rows, :, :length] = tensor[:, :, :length]
        return whole


def prepend_pasts(groups: Sequence[Tensor], past: Tensor, packing: Packing) -> list[Tensor]:
    """[B, N, C + n, D] by group: the past [B, N, C, D] of the rows, then the tokens of the rows."""
    is_single = len(packing.groups.rows) == 1  # avoids a copy of the past
    results = []
    for rows, group, length in zip(packing.groups.rows, groups, packing.past_lengths, strict=True):
        if not length:
            results.append(group)
            continue
        row_past = past[:, :, :length]
        if not is_single:
            row_past = row_past[rows]
        results.append(torch.cat([row_past, group], dim=2))
    return results


def _drop_first(groups: list[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Removes the first tokens of each group's rows."""
    pairs = zip(groups, lengths, strict=True)
    return [rows[:, :, length:] for rows, length in pairs]


def prepend_copy(rows: Tensor, shared: Tensor) -> Tensor:
    """Puts [1, N, C, D] in front of each of [B, N, n, D]."""
    copies = shared.expand(len(rows), -1, -1, -1)
    return torch.cat([copies, rows], dim=2)


def fold_heads(rows: Tensor, key: Tensor) -> Tensor:
    """Joins the query heads of each key head to one long query: [1, heads, R, D] -> [1, N, heads / N * R, D]."""
    return rows.reshape(1, key.shape[1], -1, rows.shape[3])


def split_groups(rows: Tensor, packing: Packing, fill: float | None = None) -> list[Tensor]:
    """[1, heads, R, D] -> [B, heads, n, D] by group; padding is `fill`, or an arbitrary finite value."""
    groups = packing.groups
    by_token = rows.transpose(1, 2)[0].index_select(0, groups.source)  # [sum of B * n, heads, D]
    if fill is not None:
        by_token.index_fill_(0, groups.gaps, fill)
    parts = by_token.split([batch * longest for batch, longest in groups.shapes])
    pairs = zip(parts, groups.shapes, strict=True)
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in pairs]


def join_groups(rows: Sequence[Tensor], packing: Packing) -> Tensor:
    """[B, heads, n, D] by group -> [1, heads, R, D]."""
    parts = (part.transpose(1, 2).flatten(0, 1) for part in rows)
    by_token = torch.cat(list(parts))
    return by_token.index_select(0, packing.groups.positions).transpose(0, 1)[None]


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attentions of the same queries to different keys.

    Args:
        out: [1, heads, R, D].
        lse: [1, heads, R] log-sum-exps of `out`.
        other: [1, heads, R, D].
        other_lse: [1, heads, R] log-sum-exps of `other`.
    """
    total = torch.logaddexp(lse, other_lse)
    weight = (lse - total).exp()[..., None].to(out.dtype)
    other_weight = (other_lse - total).exp()[..., None].to(out.dtype)
    return out * weight + other * other_weight, total


def register() -> None:
    """Registers the function in transformers under `NAME`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
