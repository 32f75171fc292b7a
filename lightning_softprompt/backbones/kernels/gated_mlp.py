"""Gated linear units that keep two tensors a layer for their backward pass, where PyTorch's operations keep three.

Shazeer 2020 (arXiv 2002.05202), y = silu(gate) * up. What the middle one was is found again from `gate`.
"""

from __future__ import annotations

import inspect
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

PARTS = ["gate_proj", "up_proj", "down_proj"]  # of a layer's perceptron, as models call them


def use_lean_gated_mlp(model: nn.Module) -> int:
    """Has a model's gated perceptrons keep less, and says how many. Which modules are such is tried out."""
    found = [module for module in model.modules() if _is_gated(module)]
    for module in found:
        module.forward = partial(_perceptron, module)
    return len(found)


def _is_gated(module: nn.Module) -> bool:
    """Whether a module computes what `_perceptron` does; a copy with small matrices tells, which costs nothing."""
    parts = [part for name, part in module.named_children() if name in PARTS]
    if len(parts) != len(PARTS) or not all(type(part) is nn.Linear for part in parts) or "forward" in vars(module):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    small = copy(module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        small.__dict__["_modules"] = {**module._modules, **{name: nn.Linear(3, 3) for name in PARTS}}
        probe = torch.linspace(-2, 3, 6).view(1, 2, 3)
        try:
            return torch.allclose(small(probe), _perceptron(small, probe), rtol=1e-5)
        except (TypeError, ValueError, RuntimeError):  # it wants other inputs
            return False


def _perceptron(module: nn.Module, hidden: Tensor) -> Tensor:
    gate, up, down = (cast(nn.Module, getattr(module, name)) for name in PARTS)
    return down(GatedUnit.apply(gate(hidden), up(hidden)))  # type: ignore[no-any-return, no-untyped-call]


class GatedUnit(torch.autograd.Function):
    """y = silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """The output, shaped as both."""
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, silu(gate).mul_(grad)
