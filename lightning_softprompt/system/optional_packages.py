"""Imports packages of the extras."""

from __future__ import annotations

from importlib import import_module
from typing import Any

EXTRAS = {
    "bm25s": "rag",
    "faiss": "rag",
    "fastapi": "serve",
    "if_verifiable": "alignment",
    "jsonschema": "json-schema",
    "prometheus_client": "serve",
    "qdrant_client": "qdrant",
    "uvicorn": "serve",
}
PURPOSES = {  # by extra
    "alignment": "the constraints of IFEval require",
    "json-schema": "JsonSchema requires",
    "serve": "the server requires",
}


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
        purpose = PURPOSES.get(extra, "retrieval requires")
        raise ValueError(f"{purpose} the package {module}; pip install 'lightning-softprompt[{extra}]'") from None
