"""Root-mean-square norms with frozen weights: fewer passes over memory than PyTorch's operations one by one.

Zhang & Sennrich 2019 (arXiv 1910.07467), y = w * x / sqrt(mean(x^2) + eps). What is saved for the backward pass is the
input and one number a token; a frozen weight wants no gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPSILON = ("variance_epsilon", "eps")  # what models call it


def use_frozen_rms_norm(model: nn.Module) -> int:
    """Gives norms of a model a faster forward pass, and says to how many. Which modules are such norms is tried out."""
    found = [(module, epsilon) for module in model.modules() if (epsilon := _epsilon(module)) is not None]
    for module, epsilon in found:
        module.forward = partial(_normed, module, module.forward, epsilon)
    return len(found)


def _epsilon(module: nn.Module) -> float | None:
    """What a module adds to the mean, if it is a norm that we compute as it does."""
    names = [name for name, _ in module.named_parameters()]
    values = [getattr(module, name) for name in EPSILON if isinstance(getattr(module, name, None), float)]
    if names != ["weight"] or not values or "forward" in vars(module):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gated norm has a second input
        return None
    weight = cast(Tensor, module.weight)
    probe = torch.linspace(-2, 3, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        same = torch.allclose(module(probe), RootMeanSquareNorm.apply(probe, weight, values[0]), rtol=1e-5)
    except (TypeError, ValueError, RuntimeError):  # it wants other inputs
        return None
    return values[0] if same else None


def _normed(module: nn.Module, forward: Callable[[Tensor], Tensor], epsilon: float, hidden: Tensor) -> Tensor:
    weight = cast(Tensor, module.weight)
    if weight.requires_grad or hidden.dtype != weight.dtype:  # opened by a baseline; or T5's, which casts in between
        return forward(hidden)
    return RootMeanSquareNorm.apply(hidden, weight, epsilon)  # type: ignore[no-any-return, no-untyped-call]


class RootMeanSquareNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis, in float32 at least; no gradient to w."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """The output, shaped as the input."""
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (exact * scale).to(hidden.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Dx = s * (g w) - x * s^3 * mean(x * g w), with s the scale."""
        hidden, weight, scale = ctx.saved_tensors
        exact = hidden.to(scale.dtype)
        weighed = (grad * weight).to(scale.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # which would take the product in half precision
            along = torch.linalg.vecdot(weighed, exact)[..., None] * scale.pow(3) / -hidden.shape[-1]
        return weighed.mul_(scale).addcmul_(exact, along).to(hidden.dtype), None, None
