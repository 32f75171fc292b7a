"""Backbones without weights: the shapes of a configuration, and narrow twins that compute what it would."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial, reduce
from math import gcd
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lightning_softprompt.backbones.base import Backbone, BackboneSpec
from lightning_softprompt.backbones.codec import Codec
from lightning_softprompt.backbones.load import FAMILIES, family_of, from_pretrained, load_codec, located
from lightning_softprompt.template import Template
from lightning_softprompt.types import Batch

WIDTHS = (
    *("hidden_size", "intermediate_size", "n_embd", "n_inner", "d_model", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"),
    *("encoder_attention_heads", "decoder_attention_heads"),
)
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
WINDOWS = ("max_position_embeddings", "n_positions")
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]


def load_config(spec: BackboneSpec) -> PreTrainedConfig:
    """The configuration of a backbone, of which nothing else needs to be there.

    Raises:
        ValueError: If there is none.
    """
    config: PreTrainedConfig = from_pretrained(AutoConfig.from_pretrained, located(spec))
    return config


def hollow(config: PreTrainedConfig, spec: BackboneSpec) -> Backbone:
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

    return _made(config, spec, "meta", weights)


def _nothing(size: int, rows: Tensor) -> Tensor:
    """What a layer of zeros gives, [..., H] -> [..., size], without a product of the full size."""
    return rows.new_zeros(*rows.shape[:-1], size)


def twin(config: PreTrainedConfig, spec: BackboneSpec, by: int, layers: int) -> Backbone:
    """A backbone of random weights so many times narrower, with room for any prompt; heads keep their size."""
    narrow = deepcopy(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, value in sizes(config, WIDTHS).items():
        setattr(narrow, name, value // by)
    for name in sizes(config, DEPTHS):
        setattr(narrow, name, layers)
    for name, window in sizes(config, WINDOWS).items():
        setattr(narrow, name, max(window, 1024))
    words = len(_codec(spec, family_of(config)).tokenizer)
    narrow.vocab_size = min(config.vocab_size, words)
    if (narrow.pad_token_id or 0) >= words:
        narrow.pad_token_id = None
    if hasattr(narrow, "head_dim"):
        narrow.head_dim = head_size
    if getattr(narrow, "layer_types", None):
        narrow.layer_types = narrow.layer_types[:layers]
    return _made(narrow, spec, "cpu", lambda model: model)


def narrowest(config: PreTrainedConfig) -> int:
    """How many times narrower a twin can be: its heads and widths must be whole."""
    return reduce(gcd, sizes(config, WIDTHS).values())


def depth_of(config: PreTrainedConfig) -> int:
    """L; of encoder and decoder, the deeper one's."""
    return max(sizes(config, DEPTHS).values())


def sizes(config: PreTrainedConfig, names: tuple[str, ...]) -> dict[str, int]:
    """Those that a configuration has by their own names; many have others by a second name."""
    return {name: value for name, value in config.to_dict().items() if name in names and isinstance(value, int)}


def made_rows(backbone: Backbone, rows: int, tokens: int) -> Batch:
    """Rows of about so many tokens, drawn from the vocabulary, that begin each with another."""
    codec, draw = backbone.codec, torch.Generator().manual_seed(0)
    text = "a" + " a" * ((tokens - 4) // len(codec.ids(" a")))
    batch = codec.collate([codec.encode(Template("{soft}{text}{target}").pieces({"text": text}), "a")] * rows)
    words = len(codec.tokenizer)
    ids = torch.randint(0, words, batch.input_ids.shape, generator=draw)
    ids[torch.arange(rows), batch.source.int().argmax(1)] = torch.arange(rows) % words
    return replace(batch, input_ids=torch.where(batch.source, ids, batch.input_ids))


def _made(
    config: PreTrainedConfig, spec: BackboneSpec, device: str, change: Callable[[PreTrainedModel], PreTrainedModel]
) -> Backbone:
    family = family_of(config)
    auto: Any = FAMILIES[family]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = auto.from_config(config, dtype=getattr(torch, spec.dtype), attn_implementation=spec.attention)
    plain = replace(
        spec, quantization=None, compute="plain", compiled=False, checkpointing=False, context_memory=0, context_disk=0
    )
    return family(change(model).eval(), _codec(spec, family), plain)


def _codec(spec: BackboneSpec, family: type[Backbone]) -> Codec:
    """The backbone's own; where there is none, one that reads bytes."""
    try:
        found = load_codec(spec)
        if found.decode(torch.tensor([found.ids("a")])) == ["a"]:  # transformers makes empty ones, too
            return found
    except ValueError:
        pass
    letters = sorted(ByteLevel.alphabet())
    rules = Tokenizer(BPE({word: number for number, word in enumerate([*SPECIAL, *letters])}, []))
    rules.pre_tokenizer, rules.decoder = ByteLevel(add_prefix_space=False), Decoder()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, **named)
    return family.codec_class(tokenizer, spec.padding_side)
