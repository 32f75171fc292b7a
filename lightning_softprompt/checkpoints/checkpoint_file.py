"""Reads checkpoints of runs without executing code, and finds damaged ones."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch
from torch import Tensor

from lightning_softprompt.checkpoints.run_settings import SETTINGS
from lightning_softprompt.checkpoints.safe_loading.file_limits import check_archive, check_values
from lightning_softprompt.moved import current_names

SEED = "seed"  # key of a checkpoint: the seed of the run
WITH_CLASS_NAMES = ("hyper_parameters", "method", SETTINGS)  # keys of a checkpoint whose values name classes
ZIP_ERRORS = (BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error, struct.error)


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Loads a checkpoint of plain values and tensors.

    Args:
        path: The checkpoint.
        map_location: Device of the tensors, see `torch.load`.

    Raises:
        ValueError: If the file is missing, damaged, or contains other values than plain ones and tensors. The message
            names the latest intact checkpoint of the same folder, if there is one.
    """
    path = path.expanduser()
    if not path.is_file():
        raise missing_file("checkpoint", path)
    if _is_zip(path) and (damage := find_damage(path)):
        raise _invalid_checkpoint(path, damage)
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        check_values(checkpoint, path.stat().st_size)
    except Exception as error:  # the unpickler raises almost any error on other files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _invalid_checkpoint(path, reason) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} contains a {type(checkpoint).__name__}; it was not written by this project")
    renamed = {name: current_names(checkpoint[name]) for name in WITH_CLASS_NAMES if name in checkpoint}
    return {**checkpoint, **renamed}


def find_damage(path: Path) -> str | None:
    """Describes the damage of a checkpoint; None if it is intact.

    PyTorch writes checksums of the parts of a checkpoint, but does not verify them on loading.
    """
    try:
        with ZipFile(path) as archive:
            for part in archive.infolist():
                if _has_unusual_metadata(part):
                    return f"{part.filename} has zip metadata that PyTorch never writes"
            damaged = archive.testzip()
    except ZIP_ERRORS as error:
        return str(error) or type(error).__name__
    return None if damaged is None else f"{damaged} does not match its checksum"


def _has_unusual_metadata(part: ZipInfo) -> bool:
    """Returns whether a part is compressed or a folder. PyTorch writes neither, and reads a folder as empty data."""
    return bool(part.external_attr or part.compress_type or part.compress_size != part.file_size)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def missing_file(kind: str, path: Path) -> ValueError:
    """Returns the error for a missing file. If the path is a folder, the message lists its files."""
    if not path.is_dir():
        return ValueError(f"no {kind} at {path}")
    patterns = ("*.safetensors", "*.ckpt", "*/*.ckpt")
    files = sorted(str(file) for pattern in patterns for file in path.glob(pattern))
    hint = f"; use one of its files: {', '.join(files)}" if files else " without such files"
    return ValueError(f"no {kind} at {path}, which is a folder{hint}")


def _invalid_checkpoint(path: Path, reason: str) -> ValueError:
    message = f"{path} is not a valid checkpoint of plain values and tensors: {reason}"
    others = (other for other in path.parent.glob("*.ckpt") if other != path)
    intact = [other for other in others if find_damage(other) is None]
    if intact:
        latest = max(intact, key=lambda other: other.stat().st_mtime)
        written = datetime.fromtimestamp(latest.stat().st_mtime)
        message += f". {latest}, of {written:%F %T}, is complete"
    return ValueError(message)


def are_tensors(values: Any) -> bool:
    """Returns whether a value is a mapping from names to tensors."""
    if not isinstance(values, Mapping):
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in values.items())
