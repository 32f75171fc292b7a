"""Dotted names for the values of nested configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to values by dotted name. `init_args` is left out of names, as on the command line.

    >>> flatten({"model": {"class_path": "a.b.C", "init_args": {"length": 5}}})
    {'model.class_path': 'a.b.C', 'model.length': 5}
    """
    values: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(value, Mapping):
            values[f"{prefix}{key}"] = value
        elif key == "init_args":
            values |= flatten(value, prefix)
        else:
            values |= flatten(value, f"{prefix}{key}.")
    return values
