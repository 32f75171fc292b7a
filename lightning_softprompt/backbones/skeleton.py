"""Backbones without weights: the shapes of a configuration, and narrow twins that compute what it would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.insertion.layer_stacks import shorten, stacks_of
from lightning_softprompt.backbones.loading import (
    ANOTHER,
    FAMILIES,
    family_of,
    from_pretrained,
    load_codec,
    refuse_unsupported,
    resolve_location,
)
from lightning_softprompt.backbones.small_copy import shrink_config
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError, refusing
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch

MAX_PARAMETERS = 500_000_000  # parameters of a small copy
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<mask>"]


def load_config(spec: BackboneSpec) -> PreTrainedConfig:
    """The configuration of a backbone, of which nothing else needs to be there.

    Raises:
        ValueError: If there is none.
    """
    config: PreTrainedConfig = from_pretrained(AutoConfig.from_pretrained, resolve_location(spec))
    return config


def build_skeleton(config: PreTrainedConfig, spec: BackboneSpec) -> Backbone:
    """A backbone of the full size whose weights are all one zero, which takes no memory; what it says is worthless."""

    def weights(model: PreTrainedModel) -> PreTrainedModel:
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                zero = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)
                module.register_parameter(name, nn.Parameter(zero, requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=False)
            if isinstance(module, nn.Linear):  # a method that starts from activations runs it
                module.forward = partial(_nothing, module.out_features)  # type: ignore[method-assign]
        model.tie_weights()
        return model

    return _build(config, spec, "meta", weights, _codec(spec, family_of(config)))


def _nothing(size: int, rows: Tensor) -> Tensor:
    """What a layer of zeros gives, [..., H] -> [..., size], without a product of the full size."""
    return rows.new_zeros(*rows.shape[:-1], size)


def build_small_copy(
    config: PreTrainedConfig, spec: BackboneSpec, by: int, layers: int | Mapping[str, int] | None = None
) -> Backbone:
    """A backbone of random weights so many times narrower, with room for any prompt; heads keep their size.

    Args:
        config: Of the full size.
        spec: Of the backbone.
        by: How many times narrower.
        layers: The most layers of each stack: a number for all, or by the name of the stack; others keep all layers.

    Raises:
        ValueError: If it would still be too large.
    """

    def weights(model: PreTrainedModel) -> PreTrainedModel:
        stacks = stacks_of(model)
        counts = layers if isinstance(layers, Mapping) else {stack.name: layers or len(stack) for stack in stacks}
        shorten(model, {stack: counts.get(stack.name, len(stack)) for stack in stacks})
        if (count := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
            raise UnsupportedBackboneError(f"a small copy of {type(model).__name__} would have {count:,} parameters")
        return randomize_weights(model)

    codec = _codec(spec, family_of(config))
    with refusing(f"no small copy of backbone {spec.name!r} can be built", ANOTHER):
        return _build(shrink_config(config, by, len(codec.tokenizer)), spec, "meta", weights, codec)


def randomize_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model without weights with random ones, as transformers draws them."""
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()  # what is not drawn
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)  # from when there was nothing to draw
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.init_weights()
    return model


def random_batch(backbone: Backbone, rows: int, tokens: int) -> Batch:
    """Rows of about so many tokens, drawn from the vocabulary, that begin each with another."""
    codec, draw = backbone.codec, torch.Generator().manual_seed(0)
    text = "a" + " a" * ((tokens - 4) // len(codec.ids(" a")))
    row = codec.encode(Template("{soft}{text}{target}").pieces({"text": text}), "a")
    batch = codec.collate([row] * rows)
    special = set(codec.tokenizer.all_special_ids)  # some models do not attend to padding, wherever it is
    words = torch.tensor([word for word in range(len(codec.tokenizer)) if word not in special])
    ids = words[torch.randint(len(words), batch.input_ids.shape, generator=draw)]
    ids[torch.arange(rows), batch.source.int().argmax(1)] = words[torch.arange(rows) % len(words)]
    ids = torch.where(batch.source, ids, batch.input_ids)
    return codec.collate([row._replace(ids=tuple(row_ids)) for row_ids in ids.tolist()])


def _build(
    config: PreTrainedConfig,
    spec: BackboneSpec,
    device: str,
    change: Callable[[PreTrainedModel], PreTrainedModel],
    codec: Codec,
) -> Backbone:
    family = family_of(config)
    auto: Any = FAMILIES[family]
    refuse_unsupported(config, spec, auto)
    plain = replace(
        spec,
        quantization=None,
        linear_backend="plain",
        compiled=False,
        checkpointing=False,
        context_memory=0,
        context_disk=0,
    )
    with refusing(f"backbone {spec.name!r} of type {config.model_type} is not supported", ANOTHER):
        with torch.random.fork_rng(devices=[]), torch.device(device):
            model = auto.from_config(config, dtype=getattr(torch, spec.dtype), attn_implementation=spec.attention)
        return family(change(model).eval(), codec, plain)


def _codec(spec: BackboneSpec, family: type[Backbone]) -> Codec:
    """The backbone's own; where there is none, one that reads bytes."""
    try:
        found = load_codec(spec)
        if found.decode(torch.tensor([found.ids("a")])) == ["a"]:  # transformers makes empty ones, too
            return found
    except ValueError:
        pass
    letters = sorted(ByteLevel.alphabet())
    rules = Tokenizer(BPE({word: number for number, word in enumerate([*SPECIAL_TOKENS, *letters])}, []))
    rules.pre_tokenizer, rules.decoder = ByteLevel(add_prefix_space=False), Decoder()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, **named)
    return family.codec_class(tokenizer, spec.padding_side).with_start(spec.start_token)
