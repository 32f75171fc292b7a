"""Reading and writing prompts as files: safetensors with what they belong to in the header."""

from __future__ import annotations

import errno
import json
import logging
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.fingerprint import SAMPLED, differing_part
from lightning_softprompt.checkpoints.run_settings import SETTINGS
from lightning_softprompt.checkpoints.sizes import check_archive, check_header, check_values
from lightning_softprompt.moved import current_names
from lightning_softprompt.system.atomic_files import refuse_special_file, write_file_with
from lightning_softprompt.system.tensor_files import hash_tensors

log = logging.getLogger(__name__)
SEED = "seed"  # key of a checkpoint that says what the run's random numbers began with
REPLICAS = "replicas"  # what the tensors of several prompts are named by, with their numbers
BACKBONE = "backbone"  # key of a checkpoint and of a header that says what the prompt was trained on
ROWS = "rows"  # key of a checkpoint and of a header: how rows are written, by task
CHECKSUM = "checksum"  # key of a header
HEADER = (BACKBONE, "method", ROWS)  # keys of a header that hold JSON
WITH_CLASS_NAMES = ("hyper_parameters", "method", SETTINGS)  # keys of a checkpoint whose values name classes


@dataclass(frozen=True)
class SavedPrompt:
    """A prompt as it was saved.

    Args:
        tensors: The trainable parameters by name.
        backbone: Name, revision and fingerprint of the backbone.
        method: The method's class path and arguments, as plain values.
        rows: How rows are written, by task, as plain values; a single task has the name "". Empty in files of earlier
            versions.
    """

    tensors: Mapping[str, Tensor]
    backbone: Mapping[str, Any]
    method: Mapping[str, Any]
    rows: Mapping[str, Any] = field(default_factory=dict)

    def check(self, backbone: Backbone, path: Path) -> None:
        """Refuses a prompt that was trained on another backbone.

        Raises:
            ValueError: Where the fingerprints differ.
        """
        check_backbone(self.backbone, backbone, path)


def split_replicas(saved: SavedPrompt) -> list[SavedPrompt]:
    """The prompts of a run that trained several, in order; a single one as it is."""
    numbers = replica_numbers(saved.tensors)
    if not numbers:
        return [saved]
    method = {**saved.method, "replicas": 1}
    prefixes = [f"{REPLICAS}.{number}." for number in numbers]
    parts = [{k.removeprefix(p): t for k, t in saved.tensors.items() if k.startswith(p)} for p in prefixes]
    return [SavedPrompt(part, saved.backbone, method, saved.rows) for part in parts]


def replica_numbers(tensors: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the prompts whose tensors are named by them, in order; none of a run that trained a single one."""
    parts = [name.split(".") for name in tensors if name.startswith(f"{REPLICAS}.")]
    return sorted({int(part[1]) for part in parts if part[1].isdecimal()})


def backbone_identity(backbone: Backbone) -> dict[str, Any]:
    """What a checkpoint says of its backbone."""
    spec = backbone.spec
    held = {} if spec.quantization is None else {"quantization": spec.quantization}
    return {"name": spec.name, "revision": spec.revision, **held, "fingerprint": backbone.fingerprint()}


def weights_identity(tensors: Mapping[str, Tensor]) -> str:
    """A hash of a prompt's tensors and their names."""
    return hash_tensors(tensors)[:16]


def check_backbone(saved: Mapping[str, Any], backbone: Backbone, path: Path | str) -> None:
    """Refuses to load onto a backbone whose weights or tokenizer differ; the same ones under another name are fine.

    Fingerprints of earlier versions, which sampled the weights, are compared as those versions did, with a warning.

    Raises:
        ValueError: Naming both backbones.
    """
    before = str(saved.get("fingerprint"))
    if before == backbone.spec.accept_prompts_of:
        return
    if SAMPLED.fullmatch(before) and before == backbone.sampled_fingerprint():
        log.warning(
            "%s was written by an earlier version, whose fingerprint covers a sample of the backbone's weights and not "
            "its tokenizer; nothing more could be compared", path,
        )  # fmt: skip
        return
    here = backbone_identity(backbone)
    if before == here["fingerprint"]:
        return
    difference = "" if SAMPLED.fullmatch(before) else f" ({differing_part(before, here['fingerprint'])})"
    raise ValueError(
        f"{path} was trained on {_describe(saved)}, but the backbone here is {_describe(here)}{difference}. A prompt "
        f"only works with the backbone it was trained on: set --backbone.name (and revision, and quantization) to it. "
        f"If one is a quantized form of the other, accept its prompts with --backbone.accept_prompts_of {before}"
    )


def _describe(saved: Mapping[str, Any]) -> str:
    revision = f" at {saved['revision']}" if saved.get("revision") else ""
    held = f" held as {saved['quantization']}" if saved.get("quantization") else ""
    return f"{saved.get('name')}{revision}{held} (fingerprint {saved.get('fingerprint')})"


def write_prompt(path: Path, prompt: SavedPrompt) -> None:
    """Writes safetensors, whole or not at all, with a checksum of all that is in them.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If it is a device or a pipe.
    """
    refuse_special_file(path)
    header = {BACKBONE: json.dumps(dict(prompt.backbone)), "method": json.dumps(dict(prompt.method))}
    if prompt.rows:
        header[ROWS] = json.dumps(dict(prompt.rows))
    header[CHECKSUM] = _checksum(prompt.tensors, header)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a prompt is a file, and this is a folder", str(path))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in prompt.tensors.items()}
    write_file_with(path, lambda part: save_file(tensors, part, header))


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    said = (f"{name} {text}" for name, text in sorted(header.items()) if name != CHECKSUM)
    return sha256("\n".join([weights_identity(tensors), *said]).encode()).hexdigest()


def read_prompt(path: Path) -> SavedPrompt:
    """Reads a prompt from safetensors or from a run's checkpoint, never unpickling code.

    Raises:
        ValueError: If the file is missing, broken, or not one of this project's.
    """
    path = path.expanduser()
    if not path.is_file():
        raise _missing("prompt", path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)


def _read_safetensors(path: Path) -> SavedPrompt:
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        checksum = _checksum(tensors, header)
    except Exception as error:  # types that this version of PyTorch lacks raise other errors than the library's own
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    if header.get(CHECKSUM, checksum) != checksum:
        raise ValueError(f"{path} is not a valid safetensors file: its content does not match its checksum")
    try:
        parts = {name: current_names(json.loads(header[name])) for name in HEADER if name in header}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a description of its prompt that is not valid JSON: {error}") from error
    return _saved(path, {"state_dict": tensors, "method": {}, **parts})


def _read_checkpoint(path: Path) -> SavedPrompt:
    checkpoint = load_checkpoint(path)
    return _saved(path, {"method": checkpoint.get("hyper_parameters", {}), **checkpoint})


def _saved(path: Path, said: Mapping[str, Any]) -> SavedPrompt:
    """What a file says, if it is what this project writes."""
    if BACKBONE not in said or "state_dict" not in said:
        raise ValueError(f"{path} does not say which backbone it belongs to; it was not written by this project")
    parts = [said["state_dict"], said[BACKBONE], said["method"], said.get(ROWS, {})]
    if not all(isinstance(part, Mapping) for part in parts) or not are_tensors(parts[0]):
        raise ValueError(f"{path} contains other values than tensors and mappings; it was not written by this project")
    return SavedPrompt(*parts)


def are_tensors(values: Any) -> bool:
    """Whether values are tensors by name."""
    if not isinstance(values, Mapping):
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in values.items())


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A run's checkpoint as plain values and tensors.

    Args:
        path: The checkpoint.
        map_location: Where its tensors go, as `torch.load` takes it.

    Raises:
        ValueError: If the file is missing, broken, or holds anything but plain values and tensors. It names a whole
            checkpoint that lies beside it, if there is one.
    """
    path = path.expanduser()
    if not path.is_file():
        raise _missing("checkpoint", path)
    if _starts(path) == b"PK" and (damage := find_damage(path)):
        raise _broken(path, damage)
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        check_values(checkpoint, path.stat().st_size)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise almost anything
        raise _broken(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; it was not written by this project")
    named = {name: current_names(checkpoint[name]) for name in WITH_CLASS_NAMES if name in checkpoint}
    return {**checkpoint, **named}


def find_damage(path: Path) -> str | None:
    """What of a checkpoint is not as it was written; PyTorch writes checksums of its parts, and does not look at them.

    None where all is as it was.
    """
    try:
        with ZipFile(path) as parts:
            odd = next((part.filename for part in parts.infolist() if _is_odd(part)), None)
            wrong = None if odd else parts.testzip()
    except (BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error, struct.error) as error:
        return str(error) or type(error).__name__
    if odd:
        return f"{odd} has zip metadata that PyTorch never writes"
    return None if wrong is None else f"{wrong} does not match its checksum"


def _is_odd(part: ZipInfo) -> bool:
    """PyTorch packs nothing, and what is marked as a folder it reads as nothing, without an error."""
    return bool(part.external_attr or part.compress_type or part.compress_size != part.file_size)


def _starts(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _missing(kind: str, path: Path) -> ValueError:
    """Names the files in a folder that was given in the place of one of them."""
    if not path.is_dir():
        return ValueError(f"no {kind} at {path}")
    inside = sorted(str(file) for pattern in ("*.safetensors", "*.ckpt", "*/*.ckpt") for file in path.glob(pattern))
    found = f"; name a file: {', '.join(inside)}" if inside else ", and holds none"
    return ValueError(f"no {kind} at {path}, which is a folder{found}")


def _broken(path: Path, reason: str) -> ValueError:
    beside = (other for other in path.parent.glob("*.ckpt") if other != path and find_damage(other) is None)
    whole = max(beside, key=lambda other: other.stat().st_mtime, default=None)
    way_out = (
        "" if whole is None else f". {whole}, of {datetime.fromtimestamp(whole.stat().st_mtime):%F %T}, is complete"
    )
    return ValueError(f"{path} is not a valid checkpoint of plain values and tensors: {reason}{way_out}")
