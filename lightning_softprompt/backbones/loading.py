"""Loads backbones: the model and the tokenizer, in the family that claims them, after a trial on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.contrastive.clip import CLIPBackbone
from lightning_softprompt.backbones.contrastive.siglip import SigLIPBackbone
from lightning_softprompt.backbones.insertion.embeddings import (
    EntryUnsupportedError,
    check_attends,
    check_embeddings,
    find_entry,
)
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.backbones.kernels.quantized_linear import quantization_config, refuse_with_quantized
from lightning_softprompt.backbones.location import PACKAGED, find_weight_files, resolve_location
from lightning_softprompt.backbones.masked import MaskedBackbone
from lightning_softprompt.backbones.seq2seq import Seq2SeqBackbone
from lightning_softprompt.backbones.tokenization.added_rows import read_vocabulary
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.backbones.tokenization.extended_tables import check_base, extend_tables
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError, explaining, refusing
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import SoftPrompt

log = logging.getLogger(__name__)
ANOTHER = "Use a backbone of another architecture."

# A configuration belongs to the first family that claims it.
FAMILIES: dict[type[Backbone], type] = {
    CLIPBackbone: AutoModelForZeroShotImageClassification,
    SigLIPBackbone: AutoModelForZeroShotImageClassification,
    Seq2SeqBackbone: AutoModelForSeq2SeqLM,
    MaskedBackbone: AutoModelForMaskedLM,
    CausalBackbone: AutoModelForCausalLM,
}
SUPPORTS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}  # flags of transformers' models


def load_codec(spec: BackboneSpec) -> Codec:
    """Loads the codec of a backbone, without its weights.

    Raises:
        ValueError: If there is no such backbone, or its tokenizer cannot be used.
    """
    return _load_codec(resolve_location(spec))


def load_tokenizer(spec: BackboneSpec) -> Any:
    """Loads the tokenizer of a backbone, or of a folder without a backbone.

    Raises:
        ValueError: If there is no such backbone, or it has no fast tokenizer.
    """
    tokenizer = from_pretrained(AutoTokenizer.from_pretrained, resolve_location(spec), "the tokenizer")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{spec.name!r} has no fast tokenizer (tokenizer.json)")
    return tokenizer


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
    model, codec = _load_model(location, family), _load_codec(location)
    if spec.vocabulary is not None:
        extend_tables(model, read_vocabulary(spec.vocabulary).rows)
    subject = f"backbone {spec.name!r} of type {config.model_type} is not supported"
    with refusing(subject, ANOTHER):
        try:
            check_embeddings(model if family.has_lm_head else model.text_model)
            backbone = family(model, codec, spec)
            try_out(backbone)
            check_attends(backbone.stack, len(backbone.word_embeddings), backbone.is_causal)
        except UnsupportedBackboneError as reason:
            raise UnsupportedBackboneError(f"{subject}: {reason} {ANOTHER}") from reason
    if spec.vocabulary is None:
        backbone.files = find_weight_files(location)
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
            _try_head(backbone)


def _try_head(backbone: Backbone) -> None:
    """Checks that soft tokens affect the logits, unless the model has no head.

    Raises:
        EntryUnsupportedError: If soft tokens do not reach the logits.
    """
    if backbone.head.headless:
        return
    pieces = Template("{soft}a {target}").pieces({})
    row = backbone.codec.collate([backbone.codec.encode(pieces, "a")])
    first_ids = row.input_ids[:, :1]
    tokens = backbone.embed(first_ids).detach().requires_grad_()
    with torch.enable_grad():
        states = backbone.run_padded(row, SoftPrompt(tokens=tokens))
        total = backbone.head.logits(states).float().sum()
    if not total.requires_grad:
        raise EntryUnsupportedError("its logits do not depend on the input of its encoder.")
    torch.autograd.grad(total, tokens)
    backbone.head.is_plain = None  # the first batch determines it


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
    if location.vocabulary is not None:
        check_base(tokenizer, read_vocabulary(location.vocabulary), location.name)
        extended = replace(location, name=location.vocabulary, revision=None)
        tokenizer = from_pretrained(AutoTokenizer.from_pretrained, extended, "backbone.vocabulary")
    family = family_of(_load_config(location))
    return family.codec_class(tokenizer, location.padding_side).with_start(location.start_token)


def _load_config(location: BackboneSpec) -> PreTrainedConfig:
    return from_pretrained(AutoConfig.from_pretrained, location)


def _load_model(location: BackboneSpec, family: type[Backbone]) -> PreTrainedModel:
    """Loads a model.

    Raises:
        ValueError: If its files lack weights of its body. Encoders often have no language-modeling head.
    """
    auto = FAMILIES[family]
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, location.dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": location.attention, "use_safetensors": True}
    if location.quantization is not None:
        options["quantization_config"] = quantization_config(location.quantization)
    load = auto.from_pretrained  # type: ignore[attr-defined]
    model: PreTrainedModel
    model, info = from_pretrained(load, location, output_loading_info=True, **options)
    missing: Collection[str] = info["missing_keys"]
    body_prefix = f"{model.base_model_prefix}." if family.has_lm_head else ""
    missing_in_body = sorted(name for name in missing if name.startswith(body_prefix))
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
