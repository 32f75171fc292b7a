"""Configurations of the same architecture with narrower layers, whose models take the same steps at a lower cost."""

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
WINDOW = 1024  # minimum number of positions of a narrow model
PER_LAYER = "per_layer_config"  # where transformers stores the settings of single layers


def max_shrink_factor(config: PreTrainedConfig) -> int:
    """Returns the largest factor by which the text parts of a model can be narrower: heads and widths stay integers."""
    factors = [_common_divisor(part.to_dict()) for part in _text_parts(config)]
    return reduce(gcd, factors) or 1


def shrink_config(config: PreTrainedConfig, factor: int, words: int) -> PreTrainedConfig:
    """Returns a configuration with narrower text parts, another vocabulary, and room for any prompt.

    Heads keep their size. Parts that do not read text are as narrow as their sizes allow.

    Args:
        config: The configuration of the full size.
        factor: Divides the widths of text parts.
        words: Size of the vocabulary.
    """
    text_parts = {id(part) for part in _text_parts(config)}

    def shrink(part: PreTrainedConfig) -> dict[str, Any]:
        values = part.to_dict()
        is_text = id(part) in text_parts
        divisor = factor if is_text else _common_divisor(values) or 1
        _keep_head_size(values, part)
        _divide(values, divisor)
        for name in WINDOWS:
            if isinstance(values.get(name), int):
                values[name] = max(values[name], WINDOW)
        if is_text:
            _set_vocabulary(values, part, words)
        for name, inner in _inner_parts(part):
            values[name] = shrink(inner)
        return values

    return type(config).from_dict(shrink(config))


def divisors(number: int) -> list[int]:
    """Returns all divisors, the largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def _inner_parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield name, value


def _text_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns the configuration itself, and the nested ones of the parts that read and generate text."""
    inner = [part for _, part in _inner_parts(config)]
    try:
        encoder, decoder = config.get_text_config(encoder=True), config.get_text_config(decoder=True)
        text_parts = [encoder, decoder, config.get_text_config()]
    except ValueError:  # transformers finds several and cannot decide between them
        text_parts = inner
    identities = {id(part) for part in text_parts}
    return [config, *(part for part in inner if id(part) in identities)]


def _common_divisor(values: dict[str, Any]) -> int:
    """Returns the greatest common divisor of all widths; 0 if there are no widths."""
    sizes = [values[name] for name in WIDTHS if isinstance(values.get(name), int)]
    inner = [_common_divisor(layer) for layer in _layers_of(values)]
    return reduce(gcd, [*sizes, *inner], 0)


def _divide(values: dict[str, Any], divisor: int) -> None:
    for name in WIDTHS:
        if isinstance(values.get(name), int):
            values[name] //= divisor
    for layer in _layers_of(values):
        _divide(layer, divisor)


def _layers_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    return list((values.get(PER_LAYER) or {}).values())


def _keep_head_size(values: dict[str, Any], config: PreTrainedConfig) -> None:
    """Sets a head's size if the configuration would otherwise infer another one."""
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
