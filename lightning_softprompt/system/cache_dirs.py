"""The folder of the package in the user's cache."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path

NAME = "lightning-softprompt"


def cache_folder(*parts: str) -> Path:
    """Returns a folder in the user's cache, which may not exist yet.

    Args:
        parts: Path of the folder inside the package's cache.
    """
    return user_cache_path(NAME).joinpath(*parts)
