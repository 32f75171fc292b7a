"""The stacks of layers that a built model has: how many layers of which kinds, and copies of it with fewer of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

FEWEST = 2  # layers of a repeating stack that a shortened copy keeps, if it has more


@dataclass(frozen=True)
class Stack:
    """Layers that run one after another.

    Args:
        parent: Qualified name of the module that has them.
        names: Of the lists in it: one, or several of equal length that each have a piece of every layer.
        kinds: Of each layer; layers of one kind have the same modules with parameters of the same shapes.
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
        """Their modules in a model, those of the first layer first."""
        parent = model.get_submodule(self.parent)
        for pieces in zip(*(getattr(parent, name) for name in self.names), strict=True):
            yield from pieces

    @property
    def period(self) -> int:
        """After how many layers the kinds repeat, whatever the first ones are."""
        return self._repetition[1]

    @property
    def fewest(self) -> int:
        """Layers of a copy that another period can be added to; all of them where nothing repeats."""
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
                if all(self.kinds[n] == self.kinds[n - period] for n in range(end, count)):
                    return end - period, period
        raise AssertionError("a whole stack is its own period")


def stacks_of(model: nn.Module) -> list[Stack]:
    """All stacks of a model. Lists inside a layer, such as its experts, are part of the layer."""
    return list(_stacks(model, ""))


def _stacks(module: nn.Module, name: str) -> Iterator[Stack]:
    lists = {n: child for n, child in module.named_children() if isinstance(child, nn.ModuleList) and len(child)}
    by_length: dict[int, list[str]] = {}
    for own, child in lists.items():
        by_length.setdefault(len(child), []).append(own)
    for names in by_length.values():
        layers = zip(*(lists[own] for own in names), strict=True)
        yield Stack(name, tuple(names), tuple(tuple(_kind(piece) for piece in pieces) for pieces in layers))
    for own, inner in module.named_children():
        if own not in lists:
            yield from _stacks(inner, f"{name}.{own}".lstrip("."))


def _kind(layer: nn.Module) -> Hashable:
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return type(layer).__name__, shapes


def shorten(model: nn.Module, counts: Mapping[Stack, int]) -> None:
    """Leaves the first so many layers of each stack."""
    for stack, count in counts.items():
        parent: Any = model.get_submodule(stack.parent)
        for name in stack.names:
            setattr(parent, name, nn.ModuleList(list(getattr(parent, name))[:count]))


def matrix_widths(model: nn.Module, stack: Stack, count: int) -> int:
    """Rows and columns of the matrices in the first layers, added up: what a layer keeps grows with them."""
    layers = islice(stack.layers(model), count * len(stack.names))
    return sum(sum(matrix.shape[-2:]) for layer in layers for matrix in _matrices(layer))


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    modules = [module for module in layer.modules() if not isinstance(module, nn.Embedding)]
    return [weight for module in modules for weight in module.parameters(recurse=False) if weight.dim() > 1]
