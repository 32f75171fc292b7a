"""Checks that values of a file are plain, and that the classes they name can be plug-ins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from lightning_softprompt.checkpoints.safe_loading.registry import check_class

MAX_DEPTH = 32
MAX_VALUES = 200_000
SCALARS = (bool, int, float, str)
PLAIN = (*SCALARS, NoneType)


def check_plain(value: Any, location: str = "") -> None:
    """Refuses values that a config file cannot contain, deep nesting, and too many values to read quickly.

    Args:
        value: The value.
        location: Its name in messages.

    Raises:
        ValueError: If the value is refused.
    """
    location = location or "it"
    count = 0
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{location} contains more than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise ValueError(f"{location} contains more than {MAX_VALUES:,} values")
        if isinstance(item, Mapping):
            stack.extend((key, depth + 1) for key in item)
            stack.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list | tuple):
            stack.extend((inner, depth + 1) for inner in item)
        elif not isinstance(item, PLAIN):
            raise ValueError(f"{location} contains a {type(item).__name__}; expected plain values")


def check_names(value: Any, location: str) -> None:
    """Refuses unused values that name classes which cannot be plug-ins: only forged files contain them.

    Raises:
        ValueError: Naming the location.
    """
    for mapping in iterate_mappings(value):
        if "class_path" in mapping:
            try:
                check_class(mapping["class_path"])
            except ValueError as error:
                raise ValueError(f"{location}: {error}") from error


def iterate_mappings(value: Any) -> Iterator[Mapping[Any, Any]]:
    """Yields all mappings in nested values."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
