"""Calls transformers' `generate` so that options mean the same in every family, however a row begins.

The model reads ids, and soft tokens replace the output of its embedding module. Their ids are placeholders that were
never generated, so penalties and stop texts must ignore them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from lightning_softprompt.backbones.generation.backbone import GeneratingBackbone
from lightning_softprompt.backbones.insertion.reading import Reading, replace_embeddings
from lightning_softprompt.backbones.tokenization.codec import Codec

GREEDY = {"do_sample": False, "num_beams": 1}
PENALTIES: dict[str, Callable[[Any], LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}
DRAFTED = ("assistant_model", "prompt_lookup_num_tokens")  # options of speculative decoding
ON_THE_HUB = ("penalty_alpha", "num_beam_groups", "diversity_penalty", "dola_layers", "constraints", "force_words_ids")

TOKENS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def special_tokens_only(config: GenerationConfig) -> GenerationConfig:
    """The special tokens of a model's generation config. The run chooses beams, penalties and lengths."""
    return GenerationConfig(**{name: getattr(config, name, None) for name in TOKENS})


def generate(backbone: GeneratingBackbone, reading: Reading, skip: int, decoding: dict[str, Any]) -> Any:
    """Runs transformers' `generate`, whose result has `skip` tokens before each answer.

    Args:
        backbone: The backbone whose model generates.
        reading: The input.
        skip: Tokens before an answer in the result.
        decoding: The options of `Backbone.generate`.
    """
    model: Any = backbone.model
    # Processes may generate different numbers of tokens.
    options = {**generate_options(backbone.codec, skip, decoding), "synced_gpus": False}
    # A static cache may compile later passes, and speculative decoding reads several tokens in a pass.
    once = model.config.is_encoder_decoder or bool(decoding.get("cache_implementation")) or uses_speculation(decoding)
    with replace_embeddings(backbone.stack if model.config.is_encoder_decoder else model, reading, once):
        return model.generate(input_ids=reading.ids, **reading.inputs, **options)


def generate_options(codec: Codec, skip: int, decoding: dict[str, Any]) -> dict[str, Any]:
    """Options of transformers' `generate`, whose penalties and `stop` texts apply to generated tokens only.

    Raises:
        ValueError: If a decoding method requires code from the hub.
    """
    if foreign := sorted(name for name in ON_THE_HUB if decoding.get(name)):
        raise ValueError(
            f"{foreign} require code that transformers downloads and runs, which is not allowed; use beams "
            f"(num_beams, num_return_sequences) or sampling"
        )
    options = {**GREEDY, "pad_token_id": codec.pad_id, **decoding}
    stop = options.pop("stop", None)
    strengths = {name: options.pop(name, None) for name in PENALTIES}
    penalties = [AnswerProcessor(PENALTIES[name](value), skip) for name, value in strengths.items() if value]
    stops = [AnswerStops(codec, stop, skip)] if stop else []
    return {
        **options,
        "logits_processor": LogitsProcessorList([*options.get("logits_processor", ()), *penalties]),
        "stopping_criteria": StoppingCriteriaList([*options.get("stopping_criteria", ()), *stops]),
    }


def uses_speculation(decoding: dict[str, Any]) -> bool:
    """Whether decoding is speculative: an assistant model, or the text so far, proposes several tokens at a time."""
    return any(decoding.get(name) for name in DRAFTED)


def num_sequences(decoding: dict[str, Any]) -> int:
    """Number of sequences of each row that run in parallel."""
    return max(decoding.get("num_beams") or 1, decoding.get("num_return_sequences") or 1)


class AnswerProcessor(LogitsProcessor):  # type: ignore[misc]
    """Applies a logits processor to generated tokens only.

    Args:
        inner: The processor.
        skip: Tokens before the answer.
    """

    def __init__(self, inner: LogitsProcessor, skip: int) -> None:
        self.inner, self.skip = inner, skip

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The logits [B, V] of the next token."""
        return self.inner(input_ids[:, self.skip :], scores)


class AnswerStops(StoppingCriteria):  # type: ignore[misc]
    """Stops an answer at given texts, which may span tokens. The prompt is ignored.

    Args:
        codec: The backbone's codec.
        stop: The texts.
        skip: Tokens before the answer.
    """

    def __init__(self, codec: Codec, stop: Sequence[str], skip: int) -> None:
        self.codec, self.stop, self.skip = codec, tuple(stop), skip

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """[B] bool, whether the answer of a row contains one of the texts."""
        texts = self.codec.tokenizer.batch_decode(input_ids[:, self.skip :])
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)
