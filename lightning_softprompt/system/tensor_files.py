"""Cache files of tensors, with a checksum of their content."""

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
    """A file whose content differs from what was written."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors with their checksum."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, {CHECKSUM: hash_tensors(contiguous)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file.

    Raises:
        DamagedError: If the content of the file differs from what was written.
        OSError: If the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            saved = (file.metadata() or {}).get(CHECKSUM)
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if saved != hash_tensors(tensors):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum")
    return tensors


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of tensors and their names."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
