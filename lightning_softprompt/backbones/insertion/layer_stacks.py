"""The stacks of layers of a model: the number and kinds of their layers, and copies with fewer layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

FEWEST = 2  # minimum number of layers of a shortened copy of a repeating stack


@dataclass(frozen=True)
class Stack:
    """Layers that run one after another.

    Args:
        parent: Qualified name of the module that contains the layers.
        names: Names of the lists in it: one, or several of equal length that each contain a part of every layer.
        kinds: The kind of each layer; layers of one kind have the same modules with parameters of the same shapes.
    """

    parent: str
    names: tuple[str, ...]
    kinds: tuple[Hashable, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def name(self) -> str:
        """Qualified name of its first list."""
        return f"{self.parent}.{self.names[0]}".lstrip(".")

    def layers(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yields the modules of the layers of a model, in order."""
        parent = model.get_submodule(self.parent)
        lists = [getattr(parent, name) for name in self.names]
        for parts in zip(*lists, strict=True):
            yield from parts

    @property
    def period(self) -> int:
        """Number of layers after which the kinds repeat, except for those at the beginning."""
        return self._repetition[1]

    @property
    def fewest(self) -> int:
        """Number of layers of the shortest copy to which a period can be added; all layers if no kinds repeat."""
        start, period = self._repetition
        if start + 2 * period > len(self):
            return len(self)
        return min(max(FEWEST, start + period), len(self) - period)

    @property
    def _repetition(self) -> tuple[int, int]:
        """The number of layers before the kinds repeat, and the period, with the smallest sum."""
        count = len(self)
        for end in range(1, count + 1):
            for period in range(1, end + 1):
                if self.kinds[end:] == self.kinds[end - period : count - period]:
                    return end - period, period
        raise AssertionError("the complete stack is a period")


def stacks_of(model: nn.Module) -> list[Stack]:
    """Returns all stacks of a model. Lists inside a layer, such as its experts, are part of the layer."""
    return list(_find_stacks(model, ""))


def _find_stacks(module: nn.Module, name: str) -> Iterator[Stack]:
    children = dict(module.named_children())
    lists = {key: child for key, child in children.items() if isinstance(child, nn.ModuleList) and len(child)}
    by_length: dict[int, list[str]] = {}
    for key, layers in lists.items():
        by_length.setdefault(len(layers), []).append(key)
    for keys in by_length.values():
        parts_of_layers = zip(*(lists[key] for key in keys), strict=True)
        kinds = tuple(tuple(map(_kind_of, parts)) for parts in parts_of_layers)
        yield Stack(name, tuple(keys), kinds)
    for key, child in children.items():
        if key not in lists:
            yield from _find_stacks(child, f"{name}.{key}".lstrip("."))


def _kind_of(layer: nn.Module) -> Hashable:
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return type(layer).__name__, shapes


def shorten(model: nn.Module, counts: Mapping[Stack, int]) -> None:
    """Removes all but the first layers of each stack, whose number is given by stack."""
    for stack, count in counts.items():
        parent: Any = model.get_submodule(stack.parent)
        for name in stack.names:
            layers = list(getattr(parent, name))
            setattr(parent, name, nn.ModuleList(layers[:count]))


def matrix_widths(model: nn.Module, stack: Stack, count: int) -> int:
    """Returns the sum of rows and columns of the matrices in the first layers, with which the saved tensors grow."""
    layers = islice(stack.layers(model), count * len(stack.names))
    return sum(sum(matrix.shape[-2:]) for layer in layers for matrix in _matrices(layer))


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    modules = [module for module in layer.modules() if not isinstance(module, nn.Embedding)]
    return [weight for module in modules for weight in module.parameters(recurse=False) if weight.dim() > 1]
