"""Whether the initial values of parameters are needed, or are replaced by trained ones from a file.

Some initial values take minutes, or require files that exist only where a method is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_are_needed: ContextVar[bool] = ContextVar("initial_values_are_needed", default=True)


def are_initial_values_needed() -> bool:
    """Whether the method that is being built uses its initial values."""
    return _are_needed.get()


@contextmanager
def skip_initial_values(skip: bool = True) -> Iterator[None]:
    """Builds methods in this context without initial values that are costly, since they are not used.

    Args:
        skip: False changes nothing.
    """
    token = _are_needed.set(_are_needed.get() and not skip)
    try:
        yield
    finally:
        _are_needed.reset(token)
