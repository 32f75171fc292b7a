"""Runs a half-precision model in float32, one module's weights at a time, so that rounding hides no fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _View:
    """A view of a float32 weight that the backward pass needs; it is computed again from the weight."""

    weight: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.weight.detach().float().as_strided(self.size, self.stride, self.offset)


class _MasksOfQueries(TorchFunctionMode):
    """Casts additive masks to the precision of the queries: some models create them in that of their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is scaled_dot_product_attention and mask is not None and mask.dtype != torch.bool:
            kwargs = {**kwargs, "attn_mask": mask.to(args[0].dtype)}
        return func(*args, **kwargs)


def in_float32(model: nn.Module) -> AbstractContextManager[None]:
    """Runs modules in float32, with their weights, within the context. It does not copy the model.

    Quantized weights keep their form; their products take the precision of their input. A model without weights in half
    precision gets no hooks, because they would make compiled layers compile again.
    """
    is_half = any(_halves(module) for module in model.modules())
    # Tensors that are saved within it stay hidden from hooks around it in both cases, such as those of a checkpoint.
    return _in_float32(model) if is_half else saved_tensors_hooks(_return_tensor, _return_tensor)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    weights: dict[int, Tensor] = {}  # by the storage of their float32 copy, while their module runs
    units = _units(model)

    def enlarge(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = [half for owner in units[module] for half in _halves(owner)]
        vars(module)["_in_half"] = kept
        for table, name, half in kept:
            copy = half.detach().float()
            weights[copy.untyped_storage().data_ptr()] = half
            table[name] = copy
        return tuple(map(_to_float32, args))

    def restore(module: nn.Module, *_: Any) -> None:
        for table, name, half in vars(module).pop("_in_half", ()):
            weights.pop(table[name].untyped_storage().data_ptr(), None)
            table[name] = half

    def pack(tensor: Tensor) -> Tensor | _View:
        half = weights.get(tensor.untyped_storage().data_ptr())
        return tensor if half is None else _View(half, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(saved: Tensor | _View) -> Tensor:
        return saved.tensor() if isinstance(saved, _View) else saved

    handles = [
        handle
        for module in units
        for handle in (
            module.register_forward_pre_hook(enlarge),
            module.register_forward_hook(restore, always_call=True),
        )
    ]
    try:
        with saved_tensors_hooks(pack, unpack), _MasksOfQueries():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _return_tensor(tensor: Tensor) -> Tensor:
    return tensor


def _to_float32(value: Any) -> Any:
    """A half-precision tensor in float32: Mamba casts states to the precision of its head's weights before the head."""
    is_half = isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in EXACT
    return value.float() if is_half else value


def _units(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Modules whose weights are enlarged together while the first of them runs.

    A module of leaves alone is one unit: T5's perceptron asks for the precision of a weight before that layer runs.
    Each of its leaves is a unit as well, for calls from outside the module: the head of RoBERTa is such a leaf.
    """
    units: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        children = list(module.children())
        if children and not any(list(child.children()) for child in children):
            units[module] = [module, *children]
    single = {module: [module] for module in model.modules() if module not in units and _halves(module)}
    return {**units, **single}


def _halves(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A module's own plain weights and buffers in half precision, each with the table that holds it."""
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [
        (table, name, tensor)
        for table in tables
        for name, tensor in table.items()
        if type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and tensor.dtype not in EXACT
    ]
