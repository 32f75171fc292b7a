"""Conversion between soft prompts and named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.restore import LoadedMethod
from lightning_softprompt.core.refusals import MissingTaskError
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, KeysValues, SoftPrompt

SIDES = ("key", "value")
IMAGE = "image."  # of the names of tensors of the image tower
PREFIX = "parts."  # of `Folded`'s parameters, whose names have no dots


def parameter_name(name: str) -> str:
    """Returns the name of the parameter of `Folded` for a tensor."""
    return PREFIX + name.replace(".", "/")


def tensor_name(parameter: str) -> str:
    """Returns the name of the tensor for a parameter of `Folded`."""
    return parameter.removeprefix(PREFIX).replace("/", ".")


def prompt_to_tensors(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Returns the tensors of a prompt by name.

    The names are `tokens` [1, P, H], `hidden.<layer>` and `deep.<layer>` [1, P, H], `kv.<kind>.<layer>.key` and
    `.value` [1, N, P, D]. Names of the prompt of the image tower begin with `image.`.

    Raises:
        ValueError: If the prompt is not the same for every row.
    """
    if prompt.shift is not None:
        raise ValueError(
            "a prompt that shifts the embeddings of the input cannot be folded: the shift depends on the row"
        )
    tensors = {} if prompt.tokens is None else {"tokens": prompt.tokens}
    tensors |= {f"hidden.{layer}": tokens for layer, tokens in prompt.hidden.items()}
    tensors |= {f"deep.{layer}": tokens for layer, tokens in prompt.deep.items()}
    if prompt.image is not None:
        tensors |= {f"{IMAGE}{name}": tensor for name, tensor in prompt_to_tensors(prompt.image).items()}
    for kind, layers in prompt.kv.items():
        for layer, pair in layers.items():
            for side, tensor in zip(SIDES, pair, strict=True):
                tensors[f"kv.{kind}.{layer}.{side}"] = tensor
    if any(len(tensor) != 1 for tensor in tensors.values()):
        raise ValueError("an input-dependent prompt cannot be folded: it is computed from each row")
    return tensors


def fold_task(method: LoadedMethod, task: str | None) -> SoftPrompt:
    """Returns the prompt of a method as plain tensors.

    Args:
        method: The method.
        task: Name of the task; None for a prompt that all tasks share.

    Raises:
        ValueError: If there is no such task, the task is not named but the prompt depends on it, or the prompt depends
            on the row.
    """
    names = list(method.tasks)
    if task is not None and task not in names:
        raise ValueError(f"unknown task {task!r}; the tasks of the prompt are {names}")
    try:
        return method.fold(None if task is None else names.index(task))
    except MissingTaskError as error:
        raise ValueError(f"each task has another prompt; add --task with one of {names}") from error


def compute_shared_prompt(
    method: Callable[[Batch], SoftPrompt], backbone: Backbone, task: int | None = None
) -> SoftPrompt:
    """Computes the prompt of a method that is the same for every row, or every row of a task.

    Raises:
        ValueError: If the prompt depends on the row.
    """
    row = backbone.codec.encode(Template("{soft}a {target}").pieces({}), "a")
    task_ids = None if task is None else torch.tensor([task] * 2)
    batch = backbone.codec.collate([row] * 2, task_ids=task_ids)
    prompt = method(batch.to(backbone.word_embeddings.device))
    tensors = {name: tensor.clone() for name, tensor in prompt_to_tensors(prompt).items()}
    return tensors_to_prompt(tensors, prompt.blocks)


def tensors_to_prompt(tensors: Mapping[str, Tensor], blocks: tuple[int, ...] | None = None) -> SoftPrompt:
    """Returns the prompt of tensors that are named as by `prompt_to_tensors`."""
    image = {name.removeprefix(IMAGE): tensor for name, tensor in tensors.items() if name.startswith(IMAGE)}
    hidden: dict[int, Tensor] = {}
    deep: dict[int, Tensor] = {}
    kv: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name.startswith("hidden."):
            hidden[int(name.split(".")[1])] = tensor
        elif name.startswith("deep."):
            deep[int(name.split(".")[1])] = tensor
        elif name.startswith("kv.") and name.endswith(".key"):
            _, kind, layer, _ = name.split(".")
            value = tensors[f"kv.{kind}.{layer}.value"]
            kv.setdefault(kind, {})[int(layer)] = tensor, value
    keys_values: KeysValues = kv
    return SoftPrompt(
        tokens=tensors.get("tokens"),
        blocks=blocks,
        kv=keys_values,
        hidden=hidden,
        deep=deep,
        image=tensors_to_prompt(image) if image else None,
    )
