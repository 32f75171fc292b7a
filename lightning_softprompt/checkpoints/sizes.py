"""What a file may make this process allocate: no more than the file itself holds."""

from __future__ import annotations

import json
import math
import pickletools
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_softprompt.checkpoints.arguments import Spec

MAX_HEADER = 32 * 2**20  # bytes
MAX_DEPTH = 64
GLOBAL = re.compile(
    r"collections (OrderedDict|Counter|defaultdict)|builtins (set|complex)|torch (Size|device|dtype|\w+Storage|"
    r"u?int\d+|b?float\d+\w*|bool|complex\d+)|torch\.serialization _get_layout|torch\._utils "
    r"(_rebuild_tensor_v2|_rebuild_tensor_v3|_rebuild_parameter)|torch\.storage UntypedStorage"
)
LEAVES = (bool, int, float, complex, str, bytes, NoneType, Tensor, torch.dtype, torch.device, torch.layout)
FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "eye",
             "normal", "empty_strided")  # fmt: skip
LARGEST = 1_000_000  # of a whole number in a header that has nothing to do with the sizes of its tensors


def check_header(path: Path) -> None:
    """Compares the header of a safetensors file with the size of the file.

    Raises:
        ValueError: If the header is longer than the file, or no object of JSON.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"its header claims {length:,} bytes, and the file has {size:,}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its header is not JSON: {error or type(error).__name__}") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not an object of JSON")


def check_archive(path: Path) -> None:
    """Looks at what a checkpoint's pickle names and how large its parts are, before anything is loaded.

    Raises:
        ValueError: If it names what no checkpoint of this package holds, or parts are larger than the file.
    """
    with ZipFile(path) as parts:
        total = sum(part.file_size for part in parts.infolist())
        if total > path.stat().st_size:
            raise ValueError(f"its parts claim {total:,} bytes, and the file has {path.stat().st_size:,}")
        pickles = [part for part in parts.namelist() if part.endswith("data.pkl")]
        for name in pickles:
            _check_pickle(parts.read(name))


def _check_pickle(content: bytes) -> None:
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and not GLOBAL.fullmatch(str(argument))):
            raise ValueError(f"it names {argument or 'an object'}, which is neither a plain value nor a tensor")


def check_values(value: Any, size: int) -> None:
    """Refuses tensors that are larger than what is stored of them, and values that repeat each other many times.

    Args:
        value: What a file holds.
        size: The file's bytes.

    Raises:
        ValueError: If there are such.
    """
    known: dict[int, int] = {}
    count = _count(value, known, 0)
    if count > size + 1000:
        raise ValueError(f"it holds {count:,} values, with those that it repeats, in {size:,} bytes")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value, set()))
    if claimed > 2 * size:
        raise ValueError(f"its tensors claim {claimed:,} bytes, and the file has {size:,}")


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values there are, each as often as it is repeated."""
    if not isinstance(value, Mapping | list | tuple | set):
        if not isinstance(value, LEAVES):  # such as a bare storage, whose size nothing else checks
            raise ValueError(f"it holds a {type(value).__name__}, which is neither a plain value nor a tensor")
        return 1
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested in more than {MAX_DEPTH} levels")
    if id(value) not in known:
        inner = [one for pair in value.items() for one in pair] if isinstance(value, Mapping) else list(value)
        known[id(value)] = 1 + sum(_count(one, known, depth + 1) for one in inner)
    return known[id(value)]


def _tensors(value: Any, seen: set[int]) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        _check_tensor(value)
        yield value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one, seen)


def _check_tensor(tensor: Tensor) -> None:
    stored = 0 if tensor.is_meta or tensor.layout != torch.strided else tensor.untyped_storage().nbytes()
    claimed = tensor.numel() * tensor.element_size()
    if claimed > stored:
        raise ValueError(
            f"a tensor of shape {list(tensor.shape)} claims {claimed:,} bytes of {stored:,} that are stored"
        )


def check_numbers(value: Any, tensors: Mapping[str, Tensor], place: str = "") -> None:
    """Refuses whole numbers that are larger than any size of a tensor could be, such as a length of 10^12.

    Raises:
        ValueError: Naming the option.
    """
    largest = max(LARGEST, sum(tensor.numel() for tensor in tensors.values()))
    stack = [(value, place)]
    while stack:
        one, name = stack.pop()
        if isinstance(one, Spec):
            stack.extend(one.arguments.items())
        elif isinstance(one, Mapping):
            stack.extend((inner, name) for inner in one.values())
        elif isinstance(one, list | tuple):
            stack.extend((inner, name) for inner in one)
        elif type(one) is int and abs(one) > largest and "seed" not in name:
            raise ValueError(f"{name} is {one}, more than the file has numbers")


class AllocationLimit(TorchFunctionMode):
    """Within it, tensors are made as long as they are no more than what a file's own tensors lead to.

    Args:
        tensors: Those of the file.
        spare: Numbers that may be made in addition, such as those of the backbone's vocabulary.
    """

    def __init__(self, tensors: Mapping[str, Tensor], spare: int) -> None:
        super().__init__()
        self.numbers = 8 * sum(tensor.numel() for tensor in tensors.values()) + spare
        self.calls = 5000 + 500 * len(tensors)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts what `func` makes before it does."""
        if getattr(func, "__name__", "") in FACTORIES:
            self.calls -= 1
            self.numbers -= _requested(args, kwargs or {})
            if self.calls < 0 or self.numbers < 0:
                raise ValueError("its description leads to more numbers than its tensors have")
        return func(*args, **(kwargs or {}))


def _requested(args: tuple[Any, ...], options: Mapping[str, Any]) -> int:
    """The product of the sizes that a function is given, at least its largest number."""
    sizes: list[int] = []
    for one in (*args, options.get("size"), options.get("end"), options.get("n")):
        sizes.extend(one if isinstance(one, list | tuple | torch.Size) else [one] if type(one) is int else [])
    return math.prod(max(1, abs(size)) for size in sizes if type(size) is int)


def limit_build(module: Any, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Makes the next `build` of a method keep to an allowance, and name the file in its errors."""
    build = module.build

    def limited(backbone: Any) -> None:
        del module.build
        try:
            with AllocationLimit(tensors, 4 * backbone.word_embeddings.numel() + LARGEST):
                build(backbone)
        except Exception as error:  # whatever a description of sizes that do not fit leads to
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} cannot be loaded: {reason}") from error

    module.build = limited
