"""Models and servers that the user has named. An index from others cannot make this machine use any other."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.cache_dirs import cache_folder

_trusted: set[str] = set()  # names of this process


def trust(name: str | None) -> None:
    """Remembers an encoder, a tokenizer or an address that the user has named, also for later processes."""
    if name is None:
        return
    _trusted.add(name)
    try:
        write_file(_mark(name), name.encode())
    except OSError:  # without a writable cache, the user names it in each command
        return


def trust_settings(settings: IndexSettings) -> None:
    """Remembers the names in index settings that the user has set."""
    for name in (settings.encoder, settings.unit, settings.url):
        trust(name)


def check_trusted(folder: Path, settings: IndexSettings, encoder: bool) -> None:
    """Checks that the user has named the encoder, tokenizer and server of an index.

    Args:
        folder: Folder of the index.
        settings: The settings in its manifest.
        encoder: Whether to check the encoder and the tokenizer, in addition to the server.

    Raises:
        ValueError: If the user has not; names the option that accepts it.
    """
    default = IndexSettings()
    loaded = [("encoder", settings.encoder, default.encoder), ("unit", settings.unit, default.unit)] if encoder else []
    for option, name, default_name in (*loaded, ("url", settings.url, default.url)):
        if name is not None and name != default_name and not _is_trusted(name):
            raise ValueError(
                f"the manifest of {folder} names the {option} {name!r}, which you have not named yourself. To accept "
                f"it: softprompt index search {folder} QUESTION --{option} {name}. "
                f"Search without an encoder: --mode lexical"
            )


def check_trusted_names(place: str, settings: Mapping[str, Any]) -> None:
    """Checks index settings in a config that was not passed by the user, such as the config of a downloaded prompt.

    Args:
        place: Name of the settings in errors.
        settings: Plain values by name.

    Raises:
        ValueError: If the user has not named the encoder, tokenizer or server; names the setting.
    """
    default = IndexSettings()
    for option, default_name in (("encoder", default.encoder), ("unit", default.unit), ("url", default.url)):
        name = settings.get(option)
        if name is not None and name not in (default_name, "words") and not _is_trusted(str(name)):
            raise ValueError(f"{place}.{option}: it names {name!r}, which you have not named yourself")


def _is_trusted(name: str) -> bool:
    return name in _trusted or _mark(name).is_file()


def _mark(name: str) -> Path:
    return cache_folder("chosen") / sha256(name.encode()).hexdigest()[:32]
