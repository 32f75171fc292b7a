"""Checks of files before they are loaded: a file may not allocate more memory than it stores, or execute code."""

from __future__ import annotations

import json
import pickletools
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

MAX_HEADER = 32 * 2**20  # bytes
MAX_DEPTH = 64
GLOBAL = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|builtins (set|complex)|torch (Size|device|dtype|\w+Storage|"
    r"u?int\d+|b?float\d+\w*|bool|complex\d+)|torch\.serialization _get_layout|torch\._utils "
    r"(_rebuild_tensor_v2|_rebuild_tensor_v3|_rebuild_parameter)|torch\.storage UntypedStorage"
)
LEAVES = (bool, int, float, complex, str, bytes, NoneType, Tensor, torch.dtype, torch.device, torch.layout)


def check_header(path: Path) -> None:
    """Compares the header of a safetensors file with the size of the file.

    Raises:
        ValueError: If the header is longer than the file, or not a JSON object.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"its header claims {length:,} bytes, but the file has {size:,}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its header is not JSON: {error or type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")


def check_archive(path: Path) -> None:
    """Checks the names in the pickle of a checkpoint and the sizes of its parts, before anything is loaded.

    Raises:
        ValueError: If it names objects that checkpoints of this package do not contain, or parts are larger than the
            file.
    """
    with ZipFile(path) as archive:
        total = sum(part.file_size for part in archive.infolist())
        if total > path.stat().st_size:
            raise ValueError(f"its parts claim {total:,} bytes, but the file has {path.stat().st_size:,}")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                _check_pickle(archive.read(name))


def _check_pickle(content: bytes) -> None:
    for operation, argument, _ in pickletools.genops(content):
        is_refused_global = operation.name == "GLOBAL" and not GLOBAL.fullmatch(str(argument))
        if operation.name == "STACK_GLOBAL" or is_refused_global:
            raise ValueError(f"it names {argument or 'an object'}, which is neither a plain value nor a tensor")


def check_values(value: Any, size: int) -> None:
    """Refuses tensors that are larger than their storage, and values that are repeated many times.

    Args:
        value: The contents of a file.
        size: Bytes of the file.

    Raises:
        ValueError: If the value is refused.
    """
    count = _count_values(value, {}, 0)
    if count > size + 1000:
        raise ValueError(f"it contains {count:,} values, with repetitions, in {size:,} bytes")
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value, set()))
    if num_bytes > 2 * size:
        raise ValueError(f"its tensors claim {num_bytes:,} bytes, but the file has {size:,}")


def _count_values(value: Any, known_counts: dict[int, int], depth: int) -> int:
    """Counts nested values, with repetitions.

    Args:
        value: The value.
        known_counts: Counts by id of containers that were already counted.
        depth: Nesting level of the value.
    """
    if not isinstance(value, Mapping | list | tuple | set):
        if not isinstance(value, LEAVES):  # such as a storage without a tensor, whose size is not checked elsewhere
            raise ValueError(f"it contains a {type(value).__name__}, which is neither a plain value nor a tensor")
        return 1
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested in more than {MAX_DEPTH} levels")
    if id(value) not in known_counts:
        items = [*value, *value.values()] if isinstance(value, Mapping) else list(value)
        known_counts[id(value)] = 1 + sum(_count_values(item, known_counts, depth + 1) for item in items)
    return known_counts[id(value)]


def _tensors(value: Any, visited: set[int]) -> Iterable[Tensor]:
    """Yields the tensors in nested values after checking them, visiting each container once."""
    if isinstance(value, Tensor):
        _check_tensor(value)
        yield value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in visited:
        visited.add(id(value))
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, visited)


def _check_tensor(tensor: Tensor) -> None:
    has_storage = not tensor.is_meta and tensor.layout == torch.strided
    stored = tensor.untyped_storage().nbytes() if has_storage else 0
    claimed = tensor.numel() * tensor.element_size()
    if claimed > stored:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} claims {claimed:,} bytes, but {stored:,} are stored")
