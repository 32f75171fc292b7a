"""Models and servers that the user has named: an index from somebody else makes this machine load no others."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.cache_dirs import cache_folder

_trusted: set[str] = set()  # in this process


def trust(name: str | None) -> None:
    """Remembers an encoder, a tokenizer or an address that the user has named, for later processes too."""
    if name is None:
        return
    _trusted.add(name)
    try:
        write_file(_mark(name), name.encode())
    except OSError:  # without a cache that can be written, it is named again each time
        return


def trust_settings(settings: IndexSettings) -> None:
    """Remembers what the user's own settings of an index name."""
    for name in (settings.encoder, settings.unit, settings.url):
        trust(name)


def check_trusted(folder: Path, settings: IndexSettings, encoder: bool) -> None:
    """Refuses an index whose manifest names what the user has not.

    Args:
        folder: The index.
        settings: Those of its manifest.
        encoder: Whether its encoder and its tokenizer are about to be loaded, or only its server to be called.

    Raises:
        ValueError: Naming the option that accepts it.
    """
    default = IndexSettings()
    loaded = [("encoder", settings.encoder, default.encoder), ("unit", settings.unit, default.unit)] if encoder else []
    for option, name, usual in (*loaded, ("url", settings.url, default.url)):
        if name is not None and name != usual and not _is_trusted(name):
            raise ValueError(
                f"the manifest of {folder} names the {option} {name!r}, which you have not named yourself. To accept "
                f"it: softprompt index search {folder} QUESTION --{option} {name}. "
                f"Search without an encoder: --mode lexical"
            )


def check_trusted_names(place: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings of an index, in a config that the user has not named, which name what the user has not.

    Args:
        place: Names the settings in errors.
        settings: Plain values by name.

    Raises:
        ValueError: Naming the setting.
    """
    default = IndexSettings()
    for option, usual in (("encoder", default.encoder), ("unit", default.unit), ("url", default.url)):
        name = settings.get(option)
        if name is not None and name not in (usual, "words") and not _is_trusted(str(name)):
            raise ValueError(f"{place}.{option}: it names {name!r}, which you have not named yourself")


def _is_trusted(name: str) -> bool:
    return name in _trusted or _mark(name).is_file()


def _mark(name: str) -> Path:
    return cache_folder("chosen") / sha256(name.encode()).hexdigest()[:32]
