"""Attention that returns its log-sum-exp, and its gradients from a log-sum-exp over more keys than its own.

PyTorch's public attention does not return the log-sum-exp. On CPUs and CUDA devices, this module calls the kernels that
it uses. On other devices, and in precisions that the kernels do not support, plain operations compute the same, with
the scores of one layer at a time in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten
NEVER = float("-inf")
ALIGNED = 16  # values; the CUDA kernel requires rows of a bias whose length is a multiple
LSE_BLOCK = 32  # queries; the CUDA kernel pads log-sum-exps to a multiple


def attend(
    parts: Sequence[Tensor], causal: bool, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the output [B, heads, Q, D] and the log-sum-exp [B, heads, Q].

    Args:
        parts: Query [B, heads, Q, D], key and value [B, N, K, D]; N divides the query's heads.
        causal: Whether query i attends only to keys 0 to i.
        scale: Factor of the scores (default: 1 / sqrt(D)).
        mask: [B|1, 1, Q, K] bool, True where a query attends to a key; each query attends to at least one.
    """
    forward, _ = KERNELS[_kernel(parts[0])]
    return forward(*parts, causal, scale, mask)  # type: ignore[no-any-return]


def attend_backward(
    grad: Tensor, parts: Sequence[Tensor], causal: bool, scale: float | None, mask: Tensor | None = None
) -> list[Tensor]:
    """Computes the gradients of query, key and value.

    Args:
        grad: Gradient [B, heads, Q, D] of the output.
        parts: Query, key, value, output and log-sum-exp. The last two are over all keys; key and value may be a subset.
        causal: As in `attend`.
        scale: As in `attend`.
        mask: As in `attend`.
    """
    _, backward = KERNELS[_kernel(grad)]
    return backward(grad, *parts, causal, scale, mask)  # type: ignore[no-any-return]


def _kernel(query: Tensor) -> str:
    if query.device.type == "cuda" and (query.dtype == torch.float64 or query.shape[3] % 8):
        return "plain"
    return query.device.type if query.device.type in KERNELS else "plain"


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Returns the mask as a term of the scores."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, NEVER)


def _cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, mask: Tensor | None) -> Any:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, causal, attn_mask=_bias(mask, query), scale=scale)


def _cpu_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    *parts, causal, scale, mask = rest
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return list(kernel(grad, *parts, 0.0, causal, attn_mask=_bias(mask, grad), scale=scale))


def cuda(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`attend` by the kernel of CUDA devices, which does not support grouped heads."""
    kernel = aten._scaled_dot_product_efficient_attention
    parts = [query.contiguous(), *_repeat_heads(query, key, value)]
    out, lse, *_ = kernel(*parts, _align_bias(mask, query), True, 0.0, causal, scale=scale)
    return out, lse[..., : query.shape[2]]


def cuda_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    """`attend_backward` by the kernel of CUDA devices."""
    query, key, value, out, lse, causal, scale, mask = rest
    missing = -lse.shape[2] % LSE_BLOCK
    lse = torch.nn.functional.pad(lse, (0, missing), value=float("inf"))  # padded queries have no weight
    kernel = aten._scaled_dot_product_efficient_attention_backward
    seeds = [torch.zeros((), dtype=torch.long, device=grad.device)] * 2  # of dropout, which is 0
    repeated = _repeat_heads(query, key, value)
    parts = [tensor.contiguous() for tensor in (grad, query, *repeated)]
    bias = _align_bias(mask, query)
    requires_grad = [True, True, True, False]  # query, key, value and bias
    of_query, of_key, of_value, _ = kernel(
        *parts, bias, out.contiguous(), lse, *seeds, 0.0, requires_grad, causal, scale=scale
    )
    return [of_query, _sum_heads(of_key, key), _sum_heads(of_value, value)]


def _align_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Returns the mask as a term of the scores [B, heads, Q, K], in rows that the CUDA kernel accepts."""
    bias = _bias(mask, query)
    if bias is None:
        return None
    keys = bias.shape[3]
    padded = torch.nn.functional.pad(bias, (0, -keys % ALIGNED))
    return padded[..., :keys].expand(*query.shape[:2], -1, -1)


def _repeat_heads(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Repeats each of N heads for all query heads that share it."""
    heads = query.shape[1]
    return [tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in tensors]


def _sum_heads(repeated: Tensor, key: Tensor) -> Tensor:
    """Sums over the query heads that share a head."""
    return repeated.unflatten(1, (key.shape[1], -1)).sum(2)


def plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attend` without a kernel."""
    scores = _scores(query, key, causal, scale, mask)
    lse = scores.logsumexp(-1)
    share = (scores - lse[..., None]).exp().to(value.dtype)
    (repeated_value,) = _repeat_heads(query, value)
    return (share @ repeated_value).to(query.dtype), lse


def plain_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    """`attend_backward` without a kernel."""
    query, key, value, out, lse, causal, scale, mask = rest
    scores = _scores(query, key, causal, scale, mask)
    share = (scores - lse[..., None]).exp().to(grad.dtype)
    repeated_key, repeated_value = _repeat_heads(query, key, value)
    of_share = grad @ repeated_value.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)
    of_scores = share * of_share * _scale(query, scale)
    of_key = of_scores.transpose(2, 3) @ query
    of_value = share.transpose(2, 3) @ grad
    return [of_scores @ repeated_key, _sum_heads(of_key, key), _sum_heads(of_value, value)]


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / sqrt(query.shape[3]) if scale is None else scale


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float | None, mask: Tensor | None) -> Tensor:
    """Computes the scores [B, heads, Q, K], in float32 or float64."""
    (repeated_key,) = _repeat_heads(query, key)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ repeated_key.transpose(2, 3)).to(dtype) * _scale(query, scale)
    if causal:
        is_later = scores.new_ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(is_later, NEVER)
    return scores if mask is None else scores.masked_fill(~mask, NEVER)


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_cpu, _cpu_backward),
    "cuda": (cuda, cuda_backward),
    "plain": (plain, plain_backward),
}
