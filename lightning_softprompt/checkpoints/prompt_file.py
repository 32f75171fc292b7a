"""Reads and writes prompts as files: safetensors with the method and the backbone in the header."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.backbone_identity import check_backbone
from lightning_softprompt.checkpoints.checkpoint_file import SEED, are_tensors, load_checkpoint, missing_file
from lightning_softprompt.checkpoints.run_settings import SETTINGS
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
TRAINING = "training"  # key of a header: readout, data, metrics and version of the package
READOUT = "readout"  # key of a checkpoint and of `TRAINING`: class of the readout
HEADER = (BACKBONE, METHOD, ROWS, WANDB_RUN, TRAINING)  # keys of a header with JSON values
DATA_SETTINGS = ("data.", "train_rows", "validation_rows")  # settings of a checkpoint: options, and digests of rows
OPTIONAL = (ROWS, WANDB_RUN, TRAINING)  # those that a file may lack


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
        training: What is known of the training, as plain values: `version` of the package, `seed`, `step`, class name
            of the `readout`, `data` (its class, its source, and a `digest` of its options and rows), `metrics` of the
            validation at this step, each with `value` and, if known, the 95 % interval `low`, `high` and the number of
            `rows`, and the number of `parameters`. Empty in files of earlier versions.
    """

    tensors: Mapping[str, Tensor]
    backbone: Mapping[str, Any]
    method: Mapping[str, Any]
    rows: Mapping[str, Any] = field(default_factory=dict)
    wandb_run: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

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
        training = {**saved.training, "metrics": _metrics_of_replica(saved.training, k)}
        prompts.append(SavedPrompt(tensors, saved.backbone, method, saved.rows, wandb_run, training))
    return prompts


def _metrics_of_replica(training: Mapping[str, Any], k: int) -> dict[str, Any]:
    suffix = f"/{replica_name(k)}"
    metrics = training.get("metrics", {})
    return {name.removesuffix(suffix): value for name, value in metrics.items() if name.endswith(suffix)}


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
    optional = {ROWS: prompt.rows, WANDB_RUN: prompt.wandb_run, TRAINING: prompt.training}
    header |= {name: json.dumps(dict(values)) for name, values in optional.items() if values}
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
    values = {METHOD: checkpoint.get("hyper_parameters", {}), TRAINING: _describe_training(checkpoint)}
    return _to_prompt(path, {**values, **checkpoint})


def _describe_training(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint stores of its training."""
    training = {name: checkpoint[name] for name in (SEED, READOUT) if checkpoint.get(name) is not None}
    training |= {"step": checkpoint["global_step"]} if "global_step" in checkpoint else {}
    settings = checkpoint.get(SETTINGS)
    if isinstance(settings, Mapping):
        of_data = {name: settings[name] for name in settings if str(name).startswith(DATA_SETTINGS)}
        text = json.dumps(of_data, sort_keys=True, default=str)
        training["data"] = {"digest": sha256(text.encode()).hexdigest()[:16]}
    try:
        step, _, metrics = checkpoint["callbacks"]["RunFiles"]["val"][-1]  # of the last validation
        if step == checkpoint["global_step"]:
            training["metrics"] = {name: {"value": value} for name, value in metrics.items() if isfinite(value)}
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # a training without validation, or from Python
        pass
    return training


def _to_prompt(path: Path, content: Mapping[str, Any]) -> SavedPrompt:
    """Returns the contents of a file as a prompt, if this project writes such contents."""
    if BACKBONE not in content or "state_dict" not in content:
        raise ValueError(f"{path} does not name its backbone; it was not written by this project")
    tensors = content["state_dict"]
    descriptions = [content[BACKBONE], content[METHOD], *(content.get(name, {}) for name in OPTIONAL)]
    if not are_tensors(tensors) or not all(isinstance(values, Mapping) for values in descriptions):
        raise ValueError(f"{path} contains other values than tensors and mappings; it was not written by this project")
    return SavedPrompt(tensors, *descriptions)
