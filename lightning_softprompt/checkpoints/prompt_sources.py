"""The prompt files that the initial parameters of a method come from, reported by what reads them.

An initializer calls `report_prompt_source`. The method that it belongs to collects the reports while it creates its
parameters, whatever object read the file: an initializer, a part of a combined method, or the method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_collected: ContextVar[list[Path] | None] = ContextVar("prompt_sources", default=None)


def report_prompt_source(path: Path) -> None:
    """Report that initial parameters come from a prompt file, so that a run on W&B is linked to this prompt.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run.
    """
    collected = _collected.get()
    if collected is not None and path not in collected:
        collected.append(path)


@contextmanager
def collect_sources() -> Iterator[list[Path]]:
    """Collect the files that are reported in this context into a list, each once."""
    collected: list[Path] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
