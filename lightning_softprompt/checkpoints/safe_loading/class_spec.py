"""Classes with arguments that were read from a file, before they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ClassSpec:
    """A class that files may name, with checked arguments.

    Args:
        cls: The class.
        arguments: Plain values and further specs by name.
        path: The import path of the class in the file.
        deferred: Whether the argument takes a function that creates the object, and not the object itself.
        is_named: Whether a config names the class. If only one class is possible, it contains only the arguments.
    """

    cls: type
    arguments: Mapping[str, Any]
    path: str
    deferred: bool = False
    is_named: bool = True


def build(value: Any) -> Any:
    """Creates the objects that checked values describe."""
    if isinstance(value, ClassSpec):
        arguments = {name: build(argument) for name, argument in value.arguments.items()}
        return partial(value.cls, **arguments) if value.deferred else value.cls(**arguments)
    if isinstance(value, list | tuple):
        return type(value)(build(item) for item in value)
    if isinstance(value, dict):
        return {name: build(item) for name, item in value.items()}
    return value


def as_config(value: Any) -> Any:
    """Returns checked values in the form of a config file, with the import paths of the file they were read from."""
    if isinstance(value, ClassSpec):
        arguments = as_config(dict(value.arguments))
        return {"class_path": value.path, "init_args": arguments} if value.is_named else arguments
    if isinstance(value, list | tuple):
        return [as_config(item) for item in value]
    if isinstance(value, dict):
        return {name: as_config(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value
