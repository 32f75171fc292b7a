"""Reads and writes adapter folders of HF PEFT as data, without the package peft."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_softprompt.checkpoints.safe_loading.file_limits import check_header
from lightning_softprompt.system.atomic_files import write_file_with, write_folder

CONFIG, WEIGHTS, PICKLED, README = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 1 << 30
EMBEDDINGS = "prompt_embeddings"


@dataclass
class AdapterFolder:
    """The contents of an adapter folder.

    Args:
        path: The folder, for messages.
        config: The values of `adapter_config.json`.
        tensors: The tensors of `adapter_model.safetensors` by name.
        names_read: Names of the tensors that were read.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    names_read: set[str] = field(default_factory=set)

    @property
    def peft_type(self) -> str:
        """The kind of adapter, such as `PROMPT_TUNING`."""
        return str(self.config.get("peft_type"))

    def read_count(self, name: str, default: int | None = None) -> int:
        """Returns a positive number of the config.

        Args:
            name: Its name.
            default: The number if the config lacks it; None if the config must have it.

        Raises:
            ValueError: If it is missing or not a positive integer.
        """
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.path / CONFIG}: {name} must be a positive integer, got {value!r}")
        return value

    def check_count(self, name: str, expected: int, meaning: str) -> None:
        """Compares a number of the config with the backbone, if the config has it.

        Raises:
            ValueError: If they differ.
        """
        if self.config.get(name) is not None and self.read_count(name) != expected:
            raise ValueError(
                f"{self.path / CONFIG}: {name} is {self.config[name]}, but the backbone has {expected} {meaning}; "
                "pass the backbone that the adapter was trained on"
            )

    def read_tensor(self, name: str, shape: Sequence[int], meaning: str) -> Tensor:
        """Returns a tensor in float32.

        Args:
            name: Its name.
            shape: The shape that it must have.
            meaning: What the shape consists of, for messages.

        Raises:
            ValueError: If the tensor is missing, has another shape, or holds other values than finite numbers.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ValueError(f"{self.path / WEIGHTS} has no tensor {name!r}; its tensors are {sorted(self.tensors)}")
        self.names_read.add(name)
        if list(tensor.shape) != list(shape):
            raise ValueError(
                f"{self.path / WEIGHTS}: {name} must have the shape {list(shape)} ({meaning}), got {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{self.path / WEIGHTS}: {name} must hold floating-point numbers, got {tensor.dtype}")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path / WEIGHTS}: {name} has values that are not finite")
        return tensor

    def check_all_read(self) -> None:
        """Refuses tensors that no part of the imported prompt uses.

        Raises:
            ValueError: If there are such tensors.
        """
        unused = sorted(set(self.tensors) - self.names_read)
        if unused:
            raise ValueError(f"{self.path / WEIGHTS} has tensors that cannot be imported: {', '.join(unused)}")


def read_adapter(folder: Path) -> AdapterFolder:
    """Reads an adapter folder.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: If a file is missing, too large, damaged, or a link to a file outside the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected an adapter folder of PEFT with {CONFIG}")
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; pass one of its folders: {', '.join(inner)}" if inner else ""
        raise ValueError(f"{folder} has no {CONFIG}{hint}")
    if not (folder / WEIGHTS).is_file():
        pickled = f". {PICKLED} is a pickle, which is not read: save the adapter with safe_serialization=True"
        raise ValueError(f"{folder} has no {WEIGHTS}{pickled if (folder / PICKLED).exists() else ''}")
    for name, limit in ((CONFIG, MAX_CONFIG_BYTES), (WEIGHTS, MAX_WEIGHT_BYTES)):
        _check_file(folder, name, limit)
    return AdapterFolder(folder, _read_config(folder / CONFIG), _read_tensors(folder / WEIGHTS))


def _check_file(folder: Path, name: str, limit: int) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link to a file outside its folder; copy the file into the folder")
    if path.stat().st_size > limit:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must contain a JSON object, got {type(config).__name__}")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # a type that this PyTorch version lacks raises other errors than those of the library
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], readme: str) -> None:
    """Writes an adapter folder atomically.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If the folder exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or choose another folder")
    contiguous = {name: tensor.detach().cpu().to(torch.float32).contiguous() for name, tensor in tensors.items()}

    def write(draft: Path) -> None:
        write_file_with(draft / WEIGHTS, lambda part: save_file(contiguous, part, {"format": "pt"}))
        (draft / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
        (draft / README).write_text(readme)

    write_folder(folder, write)
