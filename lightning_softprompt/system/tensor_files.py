"""Tensors in files of a cache, with a checksum of all that is in them."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = "checksum"  # key of a header


class DamagedError(ValueError):
    """A file whose content is not what was written."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors with their checksum."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, {CHECKSUM: checksum(contiguous)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file.

    Raises:
        DamagedError: If they are not those that were written.
        OSError: If the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            kept = (file.metadata() or {}).get(CHECKSUM)
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if kept != checksum(tensors):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A digest of contiguous tensors and their names."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
