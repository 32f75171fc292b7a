"""Exchanges values between the processes of a run; each function also works in a single process."""

from __future__ import annotations

from typing import Any

from torch import distributed


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of their ranks. Every process must call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
