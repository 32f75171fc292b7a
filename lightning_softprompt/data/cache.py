"""Tokenized rows kept on disk, keyed by all that decides them: a changed file, template or tokenizer is a new key."""

from __future__ import annotations

import logging
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_softprompt.types import Encoded, Example

log = logging.getLogger(__name__)
VERSION = 2  # of what stands in a file; another is another key
PARTS = ("ids", "answers", "targets", "slots", "words")


def content_key(parts: Iterable[object]) -> str:
    """A hash of values by their representation."""
    digest = sha256(f"version {VERSION}".encode())
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()[:32]


def rows_digest(examples: Sequence[Example], encoded: Sequence[Encoded]) -> str:
    """How many rows there are, and a digest of their texts, labels and tokens in their order."""
    digest = sha256(f"version {VERSION}".encode())
    for example, row in zip(examples, encoded, strict=True):
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
        for part in PARTS:
            digest.update(array("q", getattr(row, part)).tobytes() + b"\0")
    return f"{len(encoded)} rows ({digest.hexdigest()[:12]})"


def cached(key: str, make: Callable[[], list[Encoded]]) -> list[Encoded]:
    """The rows kept under the key, else those that `make` gives, which are then kept."""
    path = user_cache_path("lightning-softprompt") / "tokens" / f"{key}.safetensors"
    if path.is_file():
        try:
            return unpack(load_file(path))
        except SafetensorError:
            log.warning("%s is damaged and is made again", path)
    rows = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:  # the move is atomic: readers see a whole file or none
        save_file(pack(rows), Path(draft) / "rows")
        os.replace(Path(draft) / "rows", path)
    return rows


def pack(rows: list[Encoded]) -> dict[str, Tensor]:
    """Rows as flat tensors, each part beside the lengths of its rows."""
    tensors = {"cut": torch.tensor([row.cut for row in rows])}
    for part in PARTS:
        values = [getattr(row, part) for row in rows]
        tensors[part] = torch.tensor([v for row in values for v in row], dtype=torch.int32)
        tensors[f"{part}.lengths"] = torch.tensor([len(row) for row in values])
    return tensors


def unpack(tensors: dict[str, Tensor]) -> list[Encoded]:
    """The rows that were packed."""
    parts = [_split(tensors[part].tolist(), tensors[f"{part}.lengths"].tolist()) for part in PARTS]
    return [Encoded(*row) for row in zip(*parts, tensors["cut"].tolist(), strict=True)]


def _split(flat: list[int], lengths: list[int]) -> list[tuple[int, ...]]:
    return [tuple(flat[a:b]) for a, b in pairwise(accumulate(lengths, initial=0))]
