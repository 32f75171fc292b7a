"""Limits on what a description of a method may allocate when the method is built: no more than its tensors require."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_softprompt.checkpoints.safe_loading.class_spec import ClassSpec

FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "eye",
             "normal", "empty_strided")  # fmt: skip
MAX_UNRELATED = 1_000_000  # integers up to this are accepted, whatever the sizes of the tensors


def check_numbers(spec: ClassSpec, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuses integers that exceed the size of all tensors, such as a length of 10^12. Seeds may have any value.

    Args:
        spec: The method.
        tensors: The tensors of its file.
        path: The file, for messages.

    Raises:
        ValueError: Naming the file and the option.
    """
    largest = max(MAX_UNRELATED, sum(tensor.numel() for tensor in tensors.values()))
    stack: list[tuple[Any, str]] = [(spec, "")]
    while stack:
        value, name = stack.pop()
        if isinstance(value, ClassSpec):
            stack.extend((argument, argument_name) for argument_name, argument in value.arguments.items())
        elif isinstance(value, Mapping):
            stack.extend((item, name) for item in value.values())
        elif isinstance(value, list | tuple):
            stack.extend((item, name) for item in value)
        elif type(value) is int and abs(value) > largest and "seed" not in name:
            raise ValueError(f"{path} cannot be loaded: {name} is {value}, more than the file has numbers")


class AllocationLimit(TorchFunctionMode):
    """Context that limits the number and sizes of new tensors.

    Args:
        tensors: The tensors of a file. New tensors may have eight times as many elements.
        spare: Additional elements, such as those of the backbone's vocabulary.
    """

    def __init__(self, tensors: Mapping[str, Tensor], spare: int) -> None:
        super().__init__()
        self.num_elements = 8 * sum(tensor.numel() for tensor in tensors.values()) + spare
        self.num_calls = 5000 + 500 * len(tensors)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts the elements that `func` creates before calling it."""
        if getattr(func, "__name__", "") in FACTORIES:
            self.num_calls -= 1
            self.num_elements -= _count_elements(args, kwargs or {})
            if self.num_calls < 0 or self.num_elements < 0:
                raise ValueError("its description requires more elements than its tensors have")
        return func(*args, **(kwargs or {}))


def _count_elements(args: tuple[Any, ...], options: Mapping[str, Any]) -> int:
    """Returns the product of all sizes in the arguments of a factory, an upper bound of its elements."""
    sizes: list[Any] = []
    for argument in (*args, options.get("size"), options.get("end"), options.get("n")):
        is_shape = isinstance(argument, list | tuple | torch.Size)
        sizes.extend(argument if is_shape else [argument])
    return math.prod(max(1, abs(size)) for size in sizes if type(size) is int)


def limit_build(module: Any, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Limits the allocations of the next `build` of a method, whose errors then name the file."""
    build = module.build

    def limited_build(backbone: Any) -> None:
        del module.build  # only the first call is limited
        try:
            with AllocationLimit(tensors, 4 * backbone.word_embeddings.numel() + MAX_UNRELATED):
                build(backbone)
        except Exception as error:  # sizes that do not match raise various errors
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} cannot be loaded: {reason}") from error

    module.build = limited_build
