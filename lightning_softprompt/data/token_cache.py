"""Caches tokenized rows on disk, by a hash of everything that determines them: texts, template and tokenizer."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.system.atomic_files import write_if_possible
from lightning_softprompt.system.cache_dirs import cache_folder
from lightning_softprompt.system.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
VERSION = 3  # of the file format; part of each key
# Digests contain the names that classes and fields had first, so that they do not change.
FORMER_NAMES = {"QaExample": "Asked", "ShownPassage": "Shown", "num_truncated": "cut"}
PARTS = ("ids", "answers", "targets", "slots", "words")


def content_key(parts: Iterable[object]) -> str:
    """Returns a hash of values, from their representation."""
    digest = sha256(f"version {VERSION}".encode())
    for part in parts:
        digest.update(representation(part).encode() + b"\0")
    return digest.hexdigest()[:32]


def representation(value: object) -> str:
    """Returns the `repr` of a value, with the first names of renamed classes and fields."""
    if isinstance(value, Encoded):
        return _represent_fields(value, value._asdict())
    if is_dataclass(value):
        return _represent_fields(
            value, {field.name: getattr(value, field.name) for field in fields(value) if field.repr}
        )
    if type(value) is tuple and any(map(is_dataclass, value)):
        inner = ", ".join(map(representation, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _represent_fields(value: object, values: Mapping[str, object]) -> str:
    items = [f"{FORMER_NAMES.get(name, name)}={representation(item)}" for name, item in values.items()]
    name = type(value).__name__
    return f"{FORMER_NAMES.get(name, name)}({', '.join(items)})"


def rows_digest(examples: Sequence[Example], encoded: Sequence[Encoded]) -> str:
    """Returns the number of rows, with a digest of their texts, labels and tokens in order."""
    digest = sha256(f"version {VERSION}".encode())
    for example, row in zip(examples, encoded, strict=True):
        digest.update(representation(example).encode("utf-8", "surrogatepass"))
        for part in PARTS:
            digest.update(array("q", getattr(row, part)).tobytes() + b"\0")
    return f"{len(encoded)} rows ({digest.hexdigest()[:12]})"


def load_or_encode(key: str, make: Callable[[], list[Encoded]]) -> list[Encoded]:
    """Returns the cached rows of a key. If there are none, calls `make` and caches the result if possible."""
    path = cache_folder("tokens") / f"{key}.safetensors"
    rows = _read(path)
    if rows is None:
        rows = make()
        tensors = pack(rows)
        write_if_possible(path, lambda draft: write_tensors(draft, tensors))
    return rows


def _read(path: Path) -> list[Encoded] | None:
    """Returns the rows in a file; None if the file does not exist or is damaged."""
    try:
        return unpack(read_tensors(path)) if path.is_file() else None
    except (OSError, ValueError, KeyError):
        log.warning("%s is damaged and is replaced", path)
        return None


def pack(rows: list[Encoded]) -> dict[str, Tensor]:
    """Converts rows to flat tensors, one for each field, and the length of the field in each row."""
    tensors = {"cut": torch.tensor([row.num_truncated for row in rows])}
    for part in PARTS:
        values = [getattr(row, part) for row in rows]
        tensors[part] = torch.tensor([v for row in values for v in row], dtype=torch.int32)
        tensors[f"{part}.lengths"] = torch.tensor([len(row) for row in values])
    return tensors


def unpack(tensors: dict[str, Tensor]) -> list[Encoded]:
    """Converts tensors of `pack` to rows."""
    parts = [_split(tensors[part].tolist(), tensors[f"{part}.lengths"].tolist()) for part in PARTS]
    return [Encoded(*row) for row in zip(*parts, tensors["cut"].tolist(), strict=True)]


def _split(flat: list[int], lengths: list[int]) -> list[tuple[int, ...]]:
    return [tuple(flat[a:b]) for a, b in pairwise(accumulate(lengths, initial=0))]
