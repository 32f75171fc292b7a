"""Runs only some of a model's layers, recomputes them in the backward pass, or compiles them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_softprompt.backbones.insertion.key_values import INJECTED, inject
from lightning_softprompt.core.refusals import UnsupportedBackboneError


class LayersUnsupportedError(UnsupportedBackboneError):
    """A model whose layers cannot be run separately."""


def layers_of(model: nn.Module) -> tuple[nn.Module, str]:
    """Returns the module that contains the stack of layers, and the name of the stack in it.

    Raises:
        LayersUnsupportedError: If there is not exactly one stack.
    """
    children = ((parent, name, child) for parent in model.modules() for name, child in parent.named_children())
    stacks = [(parent, name) for parent, name, child in children if _is_stack(child)]
    if len(stacks) != 1:
        raise LayersUnsupportedError(
            f"{type(model).__name__} has {len(stacks)} stacks of layers, and one is required; use another backbone, or "
            "a method without prompts for single layers"
        )
    return stacks[0]


def _is_stack(module: nn.Module) -> bool:
    is_list = isinstance(module, nn.ModuleList) and len(module) > 0
    return is_list and isinstance(module[0], GradientCheckpointingLayer)  # type: ignore[index]


@contextmanager
def starting_at(model: PreTrainedModel, first: int, hidden: Tensor) -> Iterator[None]:
    """Removes the layers below `first` within the context; layer `first` then reads states [B, T, H]."""
    parent, name = layers_of(model)
    layers: Any = getattr(parent, name)

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return hidden, *args[1:]

    handle = layers[first].register_forward_pre_hook(replace)
    setattr(parent, name, nn.ModuleList(list(layers)[first:]))
    try:
        yield
    finally:
        setattr(parent, name, layers)
        handle.remove()


class _ReachedError(Exception):
    """Stops a run at a layer."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def states_before(stack: nn.Module, layer: int | None, run: Callable[[], Any]) -> Tensor:
    """Returns the input states [B, T, H] of a layer, without running it and later layers.

    Args:
        stack: The module of the layers.
        layer: Index of the layer; None returns the output of the stack.
        run: Runs the stack.
    """
    if layer is None:
        return run().last_hidden_state  # type: ignore[no-any-return]

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError(args[0])

    parent, name = layers_of(stack)
    handle = getattr(parent, name)[layer].register_forward_pre_hook(stop)
    try:
        run()
    except _ReachedError as reached:
        return reached.states
    finally:
        handle.remove()
    raise LayersUnsupportedError(f"{type(stack).__name__} did not run its layer {layer}")


def recompute_layers(model: PreTrainedModel) -> None:
    """Makes a model's layers recompute themselves in the backward pass.

    Transformers' checkpointing requires training mode, which also enables dropout.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_run_with_recomputation, layer.forward)


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each layer separately, for rows of any length: faster than compiling the model, with the same speed."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = torch.compile(layer.forward, dynamic=True)


def _run_with_recomputation(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    extra = INJECTED.get()

    def run(*args: Any, **kwargs: Any) -> Any:
        with inject(extra):  # the backward pass runs outside of the context, and possibly in another thread
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
