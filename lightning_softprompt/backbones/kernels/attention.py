"""Attention with its log-sum-exp, and its gradients from a log-sum-exp that other keys had a part in.

PyTorch's public attention hides the log-sum-exp. On CPUs and CUDA devices these are the kernels behind it; elsewhere,
and in precisions that they lack, the same is computed plainly, with the scores of one layer at a time in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten
NEVER = float("-inf")
ALIGNED = 16  # numbers; what the CUDA kernel wants of the rows of a bias
LSE_BLOCK = 32  # queries; in these the CUDA kernel writes and reads log-sum-exps


def attend(
    parts: Sequence[Tensor], causal: bool, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, heads, Q, D] and log-sum-exp [B, heads, Q].

    Args:
        parts: Query [B, heads, Q, D], key and value [B, N, K, D]; N divides the query's heads.
        causal: Whether query i sees keys 0 to i only.
        scale: Of the scores; None takes 1 / sqrt(D).
        mask: [B|1, 1, Q, K] bool, True where a query sees a key; each sees at least one.
    """
    forward, _ = KERNELS[_kernel(parts[0])]
    return forward(*parts, causal, scale, mask)  # type: ignore[no-any-return]


def attend_backward(
    grad: Tensor, parts: Sequence[Tensor], causal: bool, scale: float | None, mask: Tensor | None = None
) -> list[Tensor]:
    """Gradients of query, key and value.

    Args:
        grad: [B, heads, Q, D] of the output.
        parts: Query, key, value, output and log-sum-exp; the last two over all keys, of which these may be a part.
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
    """What is added to the scores."""
    return None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, NEVER)


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
    """`attend` by the kernel of CUDA devices, which knows no grouped heads."""
    kernel = aten._scaled_dot_product_efficient_attention
    wide = [query.contiguous(), *_wide(query, key, value)]
    out, lse, *_ = kernel(*wide, _aligned_bias(mask, query), True, 0.0, causal, scale=scale)
    return out, lse[..., : query.shape[2]]


def cuda_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    """`attend_backward` by the kernel of CUDA devices."""
    query, key, value, out, lse, causal, scale, mask = rest
    missing = -lse.shape[2] % LSE_BLOCK
    lse = torch.nn.functional.pad(lse, (0, missing), value=float("inf"))  # queries that are none get no weight
    kernel = aten._scaled_dot_product_efficient_attention_backward
    draws = [torch.zeros((), dtype=torch.long, device=grad.device)] * 2  # of a dropout that is not there
    parts = [t.contiguous() for t in (grad, query, *_wide(query, key, value))]
    bias, wanted = _aligned_bias(mask, query), [True, True, True, False]
    of_query, of_key, of_value, _ = kernel(
        *parts, bias, out.contiguous(), lse, *draws, 0.0, wanted, causal, scale=scale
    )
    return [of_query, _narrow(of_key, key), _narrow(of_value, value)]


def _aligned_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """[B, heads, Q, K], a view of rows as long as the CUDA kernel wants them."""
    bias = _bias(mask, query)
    if bias is None:
        return None
    keys = bias.shape[3]
    return torch.nn.functional.pad(bias, (0, -keys % ALIGNED))[..., :keys].expand(*query.shape[:2], -1, -1)


def _wide(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each of N heads as often as queries share it."""
    return [t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in tensors]


def _narrow(wide: Tensor, key: Tensor) -> Tensor:
    """Summed over the queries that share a head."""
    return wide.unflatten(1, (key.shape[1], -1)).sum(2)


def plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attend` without a kernel."""
    scores = _scores(query, key, causal, scale, mask)
    lse = scores.logsumexp(-1)
    share = (scores - lse[..., None]).exp().to(value.dtype)
    return (share @ _wide(query, value)[0]).to(query.dtype), lse


def plain_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    """`attend_backward` without a kernel."""
    query, key, value, out, lse, causal, scale, mask = rest
    share = (_scores(query, key, causal, scale, mask) - lse[..., None]).exp().to(grad.dtype)
    wide_key, wide_value = _wide(query, key, value)
    of_share = grad @ wide_value.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)
    of_scores = share * of_share * _scale(query, scale)
    of_key, of_value = of_scores.transpose(2, 3) @ query, share.transpose(2, 3) @ grad
    return [of_scores @ wide_key, _narrow(of_key, key), _narrow(of_value, value)]


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / sqrt(query.shape[3]) if scale is None else scale


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float | None, mask: Tensor | None) -> Tensor:
    """[B, heads, Q, K] in float32 at least."""
    scores = (query @ _wide(query, key)[0].transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * _scale(query, scale)
    if causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[2:], dtype=torch.bool).triu(1), NEVER)
    return scores if mask is None else scores.masked_fill(~mask, NEVER)


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_cpu, _cpu_backward),
    "cuda": (cuda, cuda_backward),
    "plain": (plain, plain_backward),
}
