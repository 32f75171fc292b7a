"""Imports optional packages of retrieval."""

from __future__ import annotations

from importlib import import_module
from typing import Any

EXTRAS = {"bm25s": "rag", "faiss": "rag", "qdrant_client": "qdrant"}


def import_optional(module: str) -> Any:
    """Imports a package of an extra.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        extra = EXTRAS[module]
        raise ValueError(
            f"retrieval requires the package {module}; pip install 'lightning-softprompt[{extra}]'"
        ) from None
