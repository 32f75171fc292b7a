"""The manifest of an index. It is written last, and names the folder with the other files."""

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
FORMAT = 2  # of the files of an index, and of how texts are split into passages and words; increased by each change
PACKAGES = ("lightning-softprompt", "bm25s", "faiss-cpu", "qdrant-client", "numpy", "nltk", "transformers", "torch")


class BadIndexError(ValueError):
    """An index that cannot be opened. The message gives the reason and what to do."""


@dataclass(frozen=True)
class Manifest:
    """The contents of an index.

    Args:
        format: Format of the files.
        generation: Name of the folder inside the index that contains the files.
        collection: Name of its collection in a vector database, which updates do not change.
        corpus: A hash of all documents.
        settings: Settings that the index was built with.
        documents: Number of documents.
        passages: Number of passages.
        duplicates: Number of passages that are left out because another one has the same content.
        width: Width H of a vector; 0 without dense search.
        versions: Versions of the packages that built the index.
        files: Size and checksum of each file.
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
        """A hash of everything that determines search results: the corpus and the settings."""
        values = [self.format, self.corpus, self.settings.plain()]
        return sha256(json.dumps(values).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Replaces the manifest of an index atomically."""
        content = json.loads(json.dumps(asdict(self)))
        text = json.dumps({**content, "seal": _seal(content)}, indent=2)
        write_file(folder / NAME, f"{text}\n".encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an index, and checks that its files exist.

    Raises:
        BadIndexError: If there is no index, or it is damaged or has another format.
    """
    if not folder.exists():
        raise BadIndexError(f"there is no index {folder}; build it with `softprompt index build`")
    if not (folder / NAME).is_file():
        raise BadIndexError(f"{folder} is not an index, since it has no {NAME}; set another folder, or build one there")
    content = _read_sealed(folder / NAME)
    manifest = _parse(content, folder)
    for name, entry in manifest.files.items():
        _check_size(folder / manifest.generation / name, int(entry["bytes"]), folder)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Reads every file of an index and compares its checksum.

    Raises:
        BadIndexError: If a file has changed.
    """
    for name, entry in manifest.files.items():
        if _hash(folder / manifest.generation / name) != entry["sha256"]:
            raise BadIndexError(f"{folder} is damaged: {manifest.generation}/{name} has changed. Build the index again")


def describe_files(generation: Path) -> dict[str, dict[str, Any]]:
    """Returns the size and the checksum of each file of a folder."""
    entries: dict[str, dict[str, Any]] = {}
    for file in sorted(path for path in generation.rglob("*") if path.is_file()):
        entries[file.relative_to(generation).as_posix()] = {"bytes": file.stat().st_size, "sha256": _hash(file)}
    return entries


def package_versions() -> dict[str, str]:
    """Returns the versions of the installed packages that build an index."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _read_sealed(path: Path) -> dict[str, Any]:
    try:
        content = dict(json.loads(path.read_bytes()))
        seal = content.pop("seal")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadIndexError(f"{path} is not a manifest of an index, or is damaged ({error}). Build it again") from error
    if content.get("format") != FORMAT:
        raise BadIndexError(
            f"{path.parent} is an index of format {content.get('format')!r}; this version reads {FORMAT}. Build it "
            f"again from its corpus: softprompt index build CORPUS --index {path.parent}"
        )
    if seal != _seal(content):
        raise BadIndexError(f"{path} was changed after it was written. Build the index again")
    return content


def _parse(content: dict[str, Any], folder: Path) -> Manifest:
    expected = {field.name for field in fields(Manifest)}
    try:
        if set(content) != expected:
            raise ValueError(f"it has {sorted(content)}, expected {sorted(expected)}")
        _check_types(content)
        return Manifest(**{**content, "settings": IndexSettings.from_plain(content["settings"])})
    except (ValueError, TypeError, LookupError) as error:
        raise BadIndexError(f"{folder / NAME} cannot be used: {error}. Build the index again") from error


def _check_types(content: Mapping[str, Any]) -> None:
    """Checks that names do not lead out of the index, and that sizes are counts.

    Raises:
        ValueError: If not; names the value.
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
            raise ValueError(f"the file {str(name)[:100]!r} is not a file of an index")
    _check_settings(content)


def _check_settings(content: Mapping[str, Any]) -> None:
    """Checks the types of the settings.

    Raises:
        ValueError: If a type is wrong; names the setting.
    """
    settings = IndexSettings.from_plain(content["settings"])
    for name, value in settings.plain().items():
        default = {**DEFAULTS, "encoder": "", "url": ""}[name]
        is_missing = value is None and name in ("encoder", "url")
        expected_type = (int, float) if isinstance(default, float) else type(default)
        if not is_missing and not isinstance(value, expected_type):
            raise ValueError(f"the setting {name} is {str(value)[:100]!r}")


def _check_size(file: Path, size: int, folder: Path) -> None:
    try:
        file_size = file.stat().st_size
    except FileNotFoundError:
        raise BadIndexError(f"{folder} is damaged: {file} is missing. Build the index again") from None
    if file_size != size:
        sizes = f"{file_size} bytes, expected {size}"
        raise BadIndexError(f"{folder} is damaged: {file} has {sizes}. Build the index again")


def _seal(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()
