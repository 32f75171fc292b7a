"""Tiny random models of every language-model type of transformers, and variants that change how rows run.

Types come from transformers' auto classes. A dictionary of sizes shrinks every attribute that a configuration has, so
an architecture needs a line here only if its configuration requires another value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils.logging import disable_progress_bar

from lightning_softprompt.backbones.loading import FAMILIES, family_of
from lightning_softprompt.backbones.masked import MaskedBackbone

WINDOW = 256  # positions of every model
Sizes = Mapping[str, Any]

TOKENS = {
    **{"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "mask_token_id": tiny.MASK},
    **{
        "decoder_start_token_id": tiny.EOS,
        "sep_token_id": tiny.EOS,
        "cls_token_id": tiny.BOS,
        "eod_token_id": tiny.EOS,
    },
}
SIZES: Sizes = {
    **TOKENS,
    "vocab_size": tiny.V, "vocab_size_per_layer_input": tiny.V, "type_vocab_size": 2, "max_position_embeddings": WINDOW,
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len", "max_position_embeddings", "model_max_length"), WINDOW),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embedding_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "pooler_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("d_inner", "hidden_dim", "ffn_hidden_size", "dim_ff", "dff", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "v_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "dim_head", "attention_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "index_n_heads", "o_groups"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "attention_chunk_size"), 16),
    **dict.fromkeys(("window_size", "attention_window", "keep_window_size", "floor_scale"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "max_window_layers": 1, "index_topk": 64, "relative_attention_num_buckets": 8, "hidden_size_per_layer_input": 8,
    "original_max_position_embeddings": 32, "expert_capacity": 1024, "moe_layer_end_index": 1,
    "scale_embedding": True,
}  # fmt: skip

# Values that single configurations require.
MORE: dict[str, Sizes] = {
    "bamba": {"mamba_n_heads": 8},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 2},
    "encoder-decoder": {"pad_token_id": tiny.PAD},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": tiny.V, "pad_token_id": tiny.PAD, "mask_token_id": tiny.MASK},
    "esmc": {"num_key_value_heads": 4},
    "fsmt": {"langs": ["a", "b"], "src_vocab_size": tiny.V, "tgt_vocab_size": tiny.V},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": {"d_latents": 32, "num_latents": 16, "num_self_attends_per_block": 1},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": 8, "pronunciation_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model to build.

    Args:
        model_type: Its type in transformers.
        more: Values of its configuration beyond the sizes.
        generation: Values of its generation configuration.
    """

    model_type: str
    more: Sizes = field(default_factory=dict)
    generation: Sizes = field(default_factory=dict)


def _rope(kind: str, **values: Any) -> Sizes:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5], "original_max_position_embeddings": 32}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "factor": 8.0}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {  # variants of a type that change how rows run; a variant is one line
    "llama-tied": Architecture("llama", {"tie_word_embeddings": True}),
    "llama-linear": Architecture("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": Architecture("llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 32}),
    "llama-yarn": Architecture("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama-longrope": Architecture("llama", _rope("longrope", factor=8.0, **LONG)),
    "llama-llama3": Architecture("llama", _rope("llama3", **LLAMA3)),
    "phi3-longrope": Architecture("phi3", _rope("longrope", partial_rotary_factor=1.0, **LONG)),
    "mistral-full": Architecture("mistral", {"sliding_window": None}),
    "qwen2-window": Architecture("qwen2", {"use_sliding_window": True, "sliding_window": 16}),
    "phimoe-window": Architecture("phimoe", {"sliding_window": 16}),
    "gemma2-mixed": Architecture("gemma2", MIXED),
    "gemma3-mixed": Architecture("gemma3_text", MIXED),
    "gpt_oss-mixed": Architecture("gpt_oss", MIXED),
    "llama4-mixed": Architecture("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}),
    "falcon-7b": Architecture("falcon", {"multi_query": True, "alibi": False, "new_decoder_architecture": False}),
    "falcon-rw": Architecture("falcon", {"multi_query": False, "alibi": True, "num_kv_heads": 4}),
    "longt5-tglobal": Architecture("longt5", {"encoder_attention_type": "transient-global"}),
    "t5-gated": Architecture("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "big_bird-sparse": Architecture("big_bird", {"block_size": 4, "num_random_blocks": 1}),
    "bigbird_pegasus-sparse": Architecture("bigbird_pegasus", {"block_size": 4, "num_random_blocks": 1}),
    "bart-forced": Architecture("bart", generation={"forced_bos_token_id": tiny.BOS}),
    "gemma4-per-layer": Architecture("gemma4_text", {"hidden_size_per_layer_input": 8}),
    "bert-decoder": Architecture("bert", {"is_decoder": True}),
    "roberta-decoder": Architecture("roberta", {"is_decoder": True}),
}


def architectures() -> dict[str, Architecture]:
    """Return every type of transformers with one of the three language-modeling heads, and the variants."""
    names = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    return {name: Architecture(name) for name in sorted(names)} | VARIANTS


def config_of(architecture: Architecture) -> PreTrainedConfig:
    """Return the small configuration of an architecture."""
    return _small(CONFIG_MAPPING[architecture.model_type], architecture.more)


def _small(config_class: type[PreTrainedConfig], more: Sizes) -> PreTrainedConfig:
    plain = config_class()
    required = {**MORE.get(config_class.model_type, {}), **more}
    values = {name: value for name, value in SIZES.items() if _is_size(plain, name)} | required
    if "kv_lora_rank" in values:  # latent attention has as many key heads as query heads
        values.pop("num_key_value_heads", None)
        values = {"num_key_value_heads": 4} | required | values
    if plain.is_encoder_decoder:
        values = {"decoder_start_token_id": tiny.EOS} | values
    for name in config_class.sub_configs:
        if isinstance(getattr(plain, name, None), PreTrainedConfig):
            values[name] = _small(type(getattr(plain, name)), more.get(name, {}))
    return config_class(**values)


def _is_size(config: PreTrainedConfig, name: str) -> bool:
    attributes = config.to_dict()
    return name in attributes and name not in config.attribute_map and attributes[name] is not None


class NotSmallError(Exception):
    """A model that cannot be built from the sizes alone."""


def save(architecture: Architecture, folder: Path) -> Path:
    """Write a folder like a model repository of a hub. A type that no auto class supports has no weights.

    Raises:
        NotSmallError: If its configuration or its model cannot be built.
    """
    disable_progress_bar()
    try:
        return _write(architecture, folder)
    except Exception as error:
        raise NotSmallError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error


def _write(architecture: Architecture, folder: Path) -> Path:
    config = config_of(architecture)
    family = family_of(config)
    tokenizer_for(config).save_pretrained(folder)
    if type(config) not in FAMILIES[family]._model_mapping:
        config.save_pretrained(folder)
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family].from_config(config)
        enlarge(model)
    for name, value in architecture.generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return folder


def tokenizer_for(config: PreTrainedConfig) -> Any:
    """Return a tokenizer of whole words with the usual special tokens of the family."""
    family = "bert" if family_of(config) is MaskedBackbone else "llama"
    tokenizer = tiny.tokenizer("t5" if config.is_encoder_decoder else family)
    tokenizer.model_max_length = WINDOW
    return tokenizer


@torch.no_grad()
def enlarge(model: PreTrainedModel) -> None:
    """Scale weights up so that a word at another position changes the logits."""
    for weight in model.parameters():
        if not weight.is_floating_point():
            continue
        if weight.dim() == 1:
            weight.add_(torch.randn_like(weight), alpha=0.05)
        elif float(weight.std()) < 0.2:
            weight.normal_(std=0.25)
