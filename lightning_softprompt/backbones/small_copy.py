"""Configurations of the same architecture with narrower layers, whose models compute the same steps for less."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from math import gcd
from typing import Any

from transformers import PreTrainedConfig

WIDTHS = (
    *("hidden_size", "intermediate_size", "n_embd", "n_inner", "d_model", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("shared_intermediate_size", "ffn_dim", "ffn_hidden_size", "expert_ffn_hidden_size", "dim", "hidden_dim", "dff"),
    *("d_inner", "dim_ff", "emb_dim", "embedding_size", "true_hidden_size", "intra_bottleneck_size", "lru_width"),
    *("attention_hidden_size", "feed_forward_size", "input_embedding_size", "output_embedding_size", "mamba_d_ssm"),
    *("word_embed_proj_dim", "intermediate_size_mlp", "dense_intermediate_size", "shared_experts_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "n_heads", "num_kv_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"),
    *("num_decoder_attention_heads", "attention_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    *("linear_num_key_heads", "linear_num_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads"),
)
WINDOWS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"),
    *("max_target_positions", "max_encoder_position_embeddings", "max_decoder_position_embeddings"),
)
VOCABULARIES = ("vocab_size_per_layer_input", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size")
WINDOW = 1024  # positions of a narrow model, at least
PER_LAYER = "per_layer_config"  # where transformers writes what single layers have of their own


def max_shrink_factor(config: PreTrainedConfig) -> int:
    """How many times narrower the text parts of a model can be: heads and widths must stay whole numbers."""
    of_parts = [_common(part.to_dict()) for part in _text_parts(config)]
    return reduce(gcd, of_parts) or 1


def shrink_config(config: PreTrainedConfig, by: int, words: int) -> PreTrainedConfig:
    """The configuration with text parts so many times narrower, so many words, and room for any prompt.

    Heads keep their size. Parts that read no text are as narrow as their own sizes allow.

    Args:
        config: Of the full size.
        by: Divides the widths of text parts.
        words: Size of the vocabulary.
    """
    text = {id(part) for part in _text_parts(config)}

    def change(part: PreTrainedConfig) -> dict[str, Any]:
        values = part.to_dict()
        divisor = by if id(part) in text else _common(values) or 1
        _keep_head_size(values, part)
        _divide(values, divisor)
        for name in WINDOWS:
            if isinstance(values.get(name), int):
                values[name] = max(values[name], WINDOW)
        if id(part) in text:
            _set_vocabulary(values, part, words)
        for name, inner in _inner_parts(part):
            values[name] = change(inner)
        return values

    return type(config).from_dict(change(config))


def divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def _inner_parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield name, value


def _text_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration itself, and the nested ones of the parts that read and write text."""
    inner = [part for _, part in _inner_parts(config)]
    try:
        found = [config.get_text_config(encoder=True), config.get_text_config(decoder=True), config.get_text_config()]
    except ValueError:  # transformers cannot decide which of several it is
        found = inner
    own = {id(part) for part in found}
    return [config, *(part for part in inner if id(part) in own)]


def _common(values: dict[str, Any]) -> int:
    """The greatest common divisor of all widths; 0 where there is none."""
    sizes = [values[name] for name in WIDTHS if isinstance(values.get(name), int)]
    inner = [_common(layer) for layer in _layers_of(values)]
    return reduce(gcd, [*sizes, *inner], 0)


def _divide(values: dict[str, Any], by: int) -> None:
    for name in WIDTHS:
        if isinstance(values.get(name), int):
            values[name] //= by
    for layer in _layers_of(values):
        _divide(layer, by)


def _layers_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    return list((values.get(PER_LAYER) or {}).values())


def _keep_head_size(values: dict[str, Any], config: PreTrainedConfig) -> None:
    """Writes down a head's size where a configuration would otherwise infer another one."""
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if "head_dim" in values and values["head_dim"] is None and heads and hidden:
        values["head_dim"] = hidden // heads


def _set_vocabulary(values: dict[str, Any], config: PreTrainedConfig, words: int) -> None:
    for name in (config.attribute_map.get("vocab_size", "vocab_size"), *VOCABULARIES):
        if isinstance(values.get(name), int):
            values[name] = words
    for special in ("pad_token_id", "padding_idx"):
        if isinstance(values.get(special), int) and values[special] >= words:
            values[special] = 0
