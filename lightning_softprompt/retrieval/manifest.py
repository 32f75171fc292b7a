"""What stands in an index: said by its manifest, which is written last and names the folder that holds the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.system.atomic_files import write_file

NAME = "manifest.json"
NAMED = re.compile(r"[\w-]*")
DEFAULTS = IndexSettings().plain()
FORMAT = 2  # of an index's files, and of how texts are cut and split into words; a change of it is another number
PACKAGES = ("lightning-softprompt", "bm25s", "faiss-cpu", "qdrant-client", "numpy", "nltk", "transformers", "torch")


class BadIndexError(ValueError):
    """An index that cannot be opened; the message says why and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What stands in an index.

    Args:
        format: Of the files.
        generation: The folder inside the index that holds them.
        collection: Its name in a vector database; the same through all updates.
        corpus: A hash of all documents.
        settings: What it was made with.
        documents: How many.
        passages: How many.
        duplicates: Passages that were left out, since another has the same content.
        width: H, numbers of a vector; 0 without dense search.
        versions: Of packages that made it.
        files: Size and hash of each file.
    """

    format: int
    generation: str
    collection: str
    corpus: str
    settings: IndexSettings
    documents: int
    passages: int
    duplicates: int
    width: int
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def identity(self) -> str:
        """What decides what is found: corpus and settings."""
        return sha256(json.dumps([self.format, self.corpus, self.settings.plain()]).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Makes an index be what this says, from one moment to the next."""
        content = json.loads(json.dumps(asdict(self)))
        write_file(folder / NAME, f"{json.dumps({**content, 'seal': _seal(content)}, indent=2)}\n".encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index, its files looked for.

    Raises:
        BadIndexError: If there is no index, or it is damaged, or of another format.
    """
    if not folder.exists():
        raise BadIndexError(f"there is no index {folder}; `softprompt index build` makes one")
    if not (folder / NAME).is_file():
        raise BadIndexError(f"{folder} is no index, since it has no {NAME}; name another folder, or build one there")
    content = _read_sealed(folder / NAME)
    manifest = _parse(content, folder)
    for name, told in manifest.files.items():
        _check_size(folder / manifest.generation / name, int(told["bytes"]), folder)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Reads every file of an index and compares its hash.

    Raises:
        BadIndexError: If one is not what was written.
    """
    for name, told in manifest.files.items():
        if _hash(folder / manifest.generation / name) != told["sha256"]:
            raise BadIndexError(f"{folder} is damaged: {manifest.generation}/{name} has changed. Build the index anew")


def describe_files(generation: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a folder."""
    files = sorted(path for path in generation.rglob("*") if path.is_file())
    return {f.relative_to(generation).as_posix(): {"bytes": f.stat().st_size, "sha256": _hash(f)} for f in files}


def package_versions() -> dict[str, str]:
    """Versions of the packages that an index is made by."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_sealed(path: Path) -> dict[str, Any]:
    try:
        content = dict(json.loads(path.read_bytes()))
        seal = content.pop("seal")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadIndexError(f"{path} is no manifest of an index, or a damaged one ({error}). Build it anew") from error
    if content.get("format") != FORMAT:
        raise BadIndexError(
            f"{path.parent} is an index of format {content.get('format')!r}, this version reads {FORMAT}. Build it "
            f"again from its corpus: softprompt index build CORPUS --index {path.parent}"
        )
    if seal != _seal(content):
        raise BadIndexError(f"{path} was changed after it was written. Build the index anew")
    return content


def _parse(content: dict[str, Any], folder: Path) -> Manifest:
    wanted = {field.name for field in fields(Manifest)}
    try:
        if set(content) != wanted:
            raise ValueError(f"it says {sorted(content)}, wanted {sorted(wanted)}")
        _check_types(content)
        return Manifest(**{**content, "settings": IndexSettings.from_plain(content["settings"])})
    except (ValueError, TypeError, LookupError) as error:
        raise BadIndexError(f"{folder / NAME} cannot be used: {error}. Build the index anew") from error


def _check_types(content: Mapping[str, Any]) -> None:
    """Refuses names that lead out of the index, and sizes that are none.

    Raises:
        ValueError: Naming the value.
    """
    for name in ("generation", "collection", "corpus"):
        if not isinstance(content[name], str) or not NAMED.fullmatch(content[name]):
            raise ValueError(f"{name} is {str(content[name])[:100]!r}, which is not a name")
    for name in ("documents", "passages", "duplicates", "width"):
        if type(content[name]) is not int or not 0 <= content[name] < 2**48:
            raise ValueError(f"{name} is {str(content[name])[:100]}, which is not a count")
    if not isinstance(content["files"], Mapping):
        raise ValueError("files is not a mapping from names to sizes and checksums")
    for name, described_file in content["files"].items():
        is_inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        is_described = isinstance(described_file, Mapping) and type(described_file.get("bytes")) is int
        if not is_inside or not is_described:
            raise ValueError(f"the file {str(name)[:100]!r} is not one of an index")
    _check_settings(content)


def _check_settings(content: Mapping[str, Any]) -> None:
    """Refuses settings of other types.

    Raises:
        ValueError: Naming the setting.
    """
    settings = IndexSettings.from_plain(content["settings"])
    for name, value in settings.plain().items():
        usual = {**DEFAULTS, "encoder": "", "url": ""}[name]
        is_missing = value is None and name in ("encoder", "url")
        if not is_missing and not isinstance(value, (int, float) if isinstance(usual, float) else type(usual)):
            raise ValueError(f"the setting {name} is {str(value)[:100]!r}")


def _check_size(file: Path, size: int, folder: Path) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        raise BadIndexError(f"{folder} is damaged: {file} is missing. Build the index anew") from None
    if found != size:
        raise BadIndexError(f"{folder} is damaged: {file} has {found} bytes, wanted {size}. Build the index anew")


def _seal(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()
