"""Backbones without their weights: models of a configuration with empty weights, and narrow copies with random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
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
)
from lightning_softprompt.backbones.location import resolve_location
from lightning_softprompt.backbones.small_copy import divisors, max_shrink_factor, shrink_config
from lightning_softprompt.backbones.tokenization.added_rows import read_vocabulary
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError, refusing
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch

MAX_PARAMETERS = 500_000_000  # parameters of a small copy
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<mask>"]


class Skeleton:
    """The configuration and the tokenizer of a backbone, from which it builds models without the backbone's weights.

    The spec is resolved once, and only the files that are needed are read.

    Args:
        spec: The backbone spec.
        config: The configuration of the backbone (default: read from its files).

    Raises:
        ValueError: If there is no such backbone.
    """

    def __init__(self, spec: BackboneSpec, config: PreTrainedConfig | None = None) -> None:
        self.spec = spec
        self.config = self._load_config() if config is None else config
        self.family = family_of(self.config)

    @cached_property
    def location(self) -> BackboneSpec:
        """The spec with its name resolved to a folder or a hub id."""
        return resolve_location(self.spec)

    def _load_config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = from_pretrained(AutoConfig.from_pretrained, self.location)
        return config

    @cached_property
    def codec(self) -> Codec:
        """The codec of the backbone; one that encodes bytes if the backbone has no tokenizer."""
        try:
            codec = load_codec(self.location)
            if codec.decode(torch.tensor([codec.ids("a")])) == ["a"]:  # transformers also creates empty tokenizers
                return codec
        except ValueError:
            pass
        letters = sorted(ByteLevel.alphabet())
        vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *letters])}
        rules = Tokenizer(BPE(vocabulary, []))
        rules.pre_tokenizer, rules.decoder = ByteLevel(add_prefix_space=False), Decoder()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, **special)
        return self.family.codec_class(tokenizer, self.spec.padding_side).with_start(self.spec.start_token)

    @property
    def shrink_factors(self) -> list[int]:
        """The factors by which a small copy can be narrower, the largest first."""
        return divisors(max_shrink_factor(self.config))

    @cached_property
    def full_size(self) -> Backbone:
        """The backbone at its full size, whose weights are views of one zero: no memory, and no valid results."""
        config = deepcopy(self.config)
        if self.spec.vocabulary is not None:
            size = read_vocabulary(self.spec.vocabulary).rows[-1].id + 1
            text_config = config.get_text_config()
            text_config.vocab_size = max(text_config.vocab_size, size)
        return self._build(config, _empty_weights)

    def small_copy(self, factor: int, layers: int | Mapping[str, int] | None = None) -> Backbone:
        """Builds a narrower backbone with random weights, with room for any prompt; heads keep their size.

        Args:
            factor: By which the copy is narrower.
            layers: Maximum number of layers: one for all stacks, or by the name of the stack; other stacks keep all.

        Raises:
            ValueError: If the copy would be too large.
        """

        def shorten_and_randomize(model: PreTrainedModel) -> PreTrainedModel:
            stacks = stacks_of(model)
            counts = layers if isinstance(layers, Mapping) else {stack.name: layers or len(stack) for stack in stacks}
            shorten(model, {stack: counts.get(stack.name, len(stack)) for stack in stacks})
            parameters = sum(parameter.numel() for parameter in model.parameters())
            if parameters > MAX_PARAMETERS:
                raise UnsupportedBackboneError(
                    f"a small copy of {type(model).__name__} would have {parameters:,} parameters"
                )
            return randomize_weights(model)

        vocabulary_size = len(self.codec.tokenizer)
        with refusing(f"no small copy of backbone {self.spec.name!r} can be built", ANOTHER):
            config = shrink_config(self.config, factor, vocabulary_size)
            copy = self._build(config, shorten_and_randomize)
        copy.is_small_copy = True
        return copy

    def _build(self, config: PreTrainedConfig, add_weights: Callable[[PreTrainedModel], PreTrainedModel]) -> Backbone:
        """Builds a backbone of a configuration whose model has no weights until `add_weights` adds them."""
        auto: Any = FAMILIES[self.family]
        codec = self.codec
        refuse_unsupported(config, self.spec, auto)
        spec = replace(
            self.spec,
            quantization=None,
            linear_backend="plain",
            compiled=False,
            checkpointing=False,
            context_memory=0,
            context_disk=0,
        )
        dtype = getattr(torch, spec.dtype)
        with refusing(f"backbone {spec.name!r} of type {config.model_type} is not supported", ANOTHER):
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                model = auto.from_config(config, dtype=dtype, attn_implementation=spec.attention)
            return self.family(add_weights(model).eval(), codec, spec)


def _empty_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Sets all weights of a model to views of one zero."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(zero, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=False)
        if isinstance(module, nn.Linear):  # a method that starts from activations runs it
            module.forward = partial(_zeros, module.out_features)  # type: ignore[method-assign]
    model.tie_weights()
    return model


def _zeros(size: int, rows: Tensor) -> Tensor:
    """The output of a layer of zeros, [..., H] -> [..., size], without a product of the full size."""
    return rows.new_zeros(*rows.shape[:-1], size)


def randomize_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Initializes a model without weights with the random weights of transformers."""
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()  # transformers does not initialize all of them
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)  # set when there were no weights to initialize
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.init_weights()
    return model


def random_batch(backbone: Backbone, rows: int, tokens: int) -> Batch:
    """Returns rows of about this many random tokens of the vocabulary; no two rows begin with the same token."""
    codec, generator = backbone.codec, torch.Generator().manual_seed(0)
    text = "a" + " a" * ((tokens - 4) // len(codec.ids(" a")))
    row = codec.encode(Template("{soft}{text}{target}").pieces({"text": text}), "a")
    batch = codec.collate([row] * rows)
    special = set(codec.tokenizer.all_special_ids)  # some models do not attend to padding, wherever it is
    words = torch.tensor([word for word in range(len(codec.tokenizer)) if word not in special])
    ids = words[torch.randint(len(words), batch.input_ids.shape, generator=generator)]
    row_numbers = torch.arange(rows)
    first_of_text = batch.source.int().argmax(1)
    ids[row_numbers, first_of_text] = words[row_numbers % len(words)]
    ids = torch.where(batch.source, ids, batch.input_ids)
    return codec.collate([row._replace(ids=tuple(row_ids)) for row_ids in ids.tolist()])
