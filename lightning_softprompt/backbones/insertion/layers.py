"""A model's layers: how to run some of them only, again in the backward pass, or compiled."""

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

from lightning_softprompt.backbones.insertion.key_values import INJECTED, injected
from lightning_softprompt.core.refusals import UnsupportedBackboneError


class LayersUnsupportedError(UnsupportedBackboneError):
    """A model whose layers cannot be run apart."""


def layers_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds a stack of layers, and under which name.

    Raises:
        LayersUnsupportedError: If there is not exactly one stack.
    """
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and isinstance(child[0], GradientCheckpointingLayer)
    ]
    if len(found) != 1:
        raise LayersUnsupportedError(
            f"{type(model).__name__} has {len(found)} stacks of layers to run apart, and one is required; take "
            f"another backbone, or a method that looks into no layer"
        )
    return found[0]


@contextmanager
def starting_at(model: PreTrainedModel, first: int, hidden: Tensor) -> Iterator[None]:
    """The model without its layers below `first`, which is given these states [B, T, H] whatever the model embeds."""
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
    """Stops a run."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def states_before(stack: nn.Module, layer: int | None, run: Callable[[], Any]) -> Tensor:
    """What a layer is given [B, T, H], without a run of it and those above; without a layer, what the stack gives.

    Args:
        stack: The layers' module.
        layer: The layer's number.
        run: Runs the stack.
    """
    if layer is None:
        return run().last_hidden_state  # type: ignore[no-any-return]

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError(args[0])

    handle = getattr(*layers_of(stack))[layer].register_forward_pre_hook(stop)
    try:
        run()
    except _ReachedError as reached:
        return reached.states
    finally:
        handle.remove()
    raise LayersUnsupportedError(f"{type(stack).__name__} did not run its layer {layer}")


def recompute_layers(model: PreTrainedModel) -> None:
    """Makes a model's layers recompute themselves in the backward pass.

    Transformers' own checkpointing works in training mode only, where its dropout works too.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_recomputed, layer.forward)


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each layer for itself, for rows of any length: quicker than the model as a whole, and as fast after."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = torch.compile(layer.forward, dynamic=True)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    given = INJECTED.get()

    def again(*args: Any, **kwargs: Any) -> Any:
        with injected(given):  # the backward pass has left the context, perhaps the thread
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)
