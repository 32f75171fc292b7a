"""Reads and writes prompts as files: safetensors with the method and the backbone in the header."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.backbone_identity import check_backbone
from lightning_softprompt.checkpoints.checkpoint_file import are_tensors, load_checkpoint, missing_file
from lightning_softprompt.checkpoints.safe_loading.file_limits import check_header
from lightning_softprompt.moved import current_names
from lightning_softprompt.system.atomic_files import refuse_special_file, write_file_with
from lightning_softprompt.system.tensor_files import hash_tensors

REPLICAS = "replicas"  # first part of the tensor names of several prompts; the second part is the replica's number
BACKBONE = "backbone"  # key of a checkpoint and of a header: identity of the backbone
METHOD = "method"  # key of a header
ROWS = "rows"  # key of a checkpoint and of a header: how rows are written, by task
CHECKSUM = "checksum"  # key of a header
WANDB_RUN = "wandb_run"  # key of a checkpoint and of a header: id of the W&B run of the training
HEADER = (BACKBONE, METHOD, ROWS, WANDB_RUN)  # keys of a header with JSON values


@dataclass(frozen=True)
class SavedPrompt:
    """The contents of a prompt file.

    Args:
        tensors: Trained parameters by name.
        backbone: Name, revision and fingerprint of the backbone.
        method: Class path and arguments of the method, as plain values.
        rows: How rows are written, by task, as plain values; a single task has the name "". Empty in files of earlier
            versions.
        wandb_run: The W&B run of the training, as `{"id": ...}`, with the name of the file as `"prompt"` if it is one
            of several replicas; empty if the training was not logged to W&B.
    """

    tensors: Mapping[str, Tensor]
    backbone: Mapping[str, Any]
    method: Mapping[str, Any]
    rows: Mapping[str, Any] = field(default_factory=dict)
    wandb_run: Mapping[str, Any] = field(default_factory=dict)

    def check(self, backbone: Backbone, path: Path) -> None:
        """Refuses a backbone that the prompt was not trained on.

        Raises:
            ValueError: If the fingerprints differ.
        """
        check_backbone(self.backbone, backbone, path)


def split_replicas(saved: SavedPrompt) -> list[SavedPrompt]:
    """Returns the prompts of a run with replicas, in order; for other runs, the prompt itself."""
    numbers = replica_numbers(saved.tensors)
    if not numbers:
        return [saved]
    method = {**saved.method, "replicas": 1}
    prompts = []
    for k, number in enumerate(numbers):
        prefix = f"{REPLICAS}.{number}."
        names = [name for name in saved.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): saved.tensors[name] for name in names}
        wandb_run = {**saved.wandb_run, "prompt": replica_name(k)} if saved.wandb_run else {}
        prompts.append(SavedPrompt(tensors, saved.backbone, method, saved.rows, wandb_run))
    return prompts


def replica_name(k: int) -> str:
    """Returns the name of the k-th replica, starting at 0, in logs and files."""
    return f"replica_{k + 1}"


def replica_numbers(tensors: Mapping[str, Tensor]) -> list[int]:
    """Returns the numbers of the replicas in order; empty if the run had a single prompt."""
    parts = [name.split(".") for name in tensors if name.startswith(f"{REPLICAS}.")]
    return sorted({int(part[1]) for part in parts if part[1].isdecimal()})


def weights_identity(tensors: Mapping[str, Tensor]) -> str:
    """Returns a hash of the tensors of a prompt and their names."""
    return hash_tensors(tensors)[:16]


def write_prompt(path: Path, prompt: SavedPrompt) -> None:
    """Writes a prompt atomically as safetensors, with a checksum of its content.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the path is a device or a pipe.
    """
    refuse_special_file(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a prompt is a file, but this is a folder", str(path))
    header = {BACKBONE: json.dumps(dict(prompt.backbone)), METHOD: json.dumps(dict(prompt.method))}
    if prompt.rows:
        header[ROWS] = json.dumps(dict(prompt.rows))
    if prompt.wandb_run:
        header[WANDB_RUN] = json.dumps(dict(prompt.wandb_run))
    header[CHECKSUM] = _checksum(prompt.tensors, header)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in prompt.tensors.items()}
    write_file_with(path, lambda part: save_file(tensors, part, header))


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    lines = [weights_identity(tensors)]
    lines += [f"{name} {text}" for name, text in sorted(header.items()) if name != CHECKSUM]
    return sha256("\n".join(lines).encode()).hexdigest()


def read_prompt(path: Path) -> SavedPrompt:
    """Reads a prompt from safetensors or from the checkpoint of a run, without executing code.

    Raises:
        ValueError: If the file is missing, damaged, or was not written by this project.
    """
    path = path.expanduser()
    if not path.is_file():
        raise missing_file("prompt", path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)


def _read_safetensors(path: Path) -> SavedPrompt:
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        content_checksum = _checksum(tensors, header)
    except Exception as error:  # a type that this PyTorch version lacks raises other errors than those of the library
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    if header.get(CHECKSUM, content_checksum) != content_checksum:
        raise ValueError(f"{path} is not a valid safetensors file: its content does not match its checksum")
    try:
        values = {name: current_names(json.loads(header[name])) for name in HEADER if name in header}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not valid JSON: {error}") from error
    return _to_prompt(path, {"state_dict": tensors, METHOD: {}, **values})


def _read_checkpoint(path: Path) -> SavedPrompt:
    checkpoint = load_checkpoint(path)
    return _to_prompt(path, {METHOD: checkpoint.get("hyper_parameters", {}), **checkpoint})


def _to_prompt(path: Path, content: Mapping[str, Any]) -> SavedPrompt:
    """Returns the contents of a file as a prompt, if this project writes such contents."""
    if BACKBONE not in content or "state_dict" not in content:
        raise ValueError(f"{path} does not name its backbone; it was not written by this project")
    tensors = content["state_dict"]
    descriptions = [content[BACKBONE], content[METHOD], content.get(ROWS, {}), content.get(WANDB_RUN, {})]
    if not are_tensors(tensors) or not all(isinstance(values, Mapping) for values in descriptions):
        raise ValueError(f"{path} contains other values than tensors and mappings; it was not written by this project")
    return SavedPrompt(tensors, *descriptions)
