"""What transformers' own generation is told, so that it means the same in every family and however a row begins.

The model reads ids, and soft tokens replace the output of its embedding module. Their ids are placeholders that were
never generated: penalties and texts that stop must not look at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from lightning_softprompt.backbones.codec import Codec

if TYPE_CHECKING:
    from lightning_softprompt.backbones.base import Backbone

GREEDY = {"do_sample": False, "num_beams": 1}
PENALTIES: dict[str, Callable[[Any], LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}
DRAFTED = ("assistant_model", "prompt_lookup_num_tokens")  # decoding that checks drafts of several tokens
ON_THE_HUB = ("penalty_alpha", "num_beam_groups", "diversity_penalty", "dola_layers", "constraints", "force_words_ids")

TOKENS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def special_tokens_only(config: GenerationConfig) -> GenerationConfig:
    """A model's own settings of generation without its taste: beams, penalties and lengths are the run's to choose."""
    return GenerationConfig(**{name: getattr(config, name, None) for name in TOKENS})


@dataclass(frozen=True)
class Reading:
    """What generation reads: tokens by id, of which the first are embedded as the rows have them.

    Args:
        ids: [B, M] tokens; those of soft tokens and of padding are placeholders.
        embeds: [B, m, H] what the first m of them are embedded as.
        inputs: Masks, positions and a cache for transformers' `generate`.
    """

    ids: Tensor
    embeds: Tensor
    inputs: dict[str, Any]


def generate(backbone: Backbone, reading: Reading, skip: int, decoding: dict[str, Any]) -> Any:
    """Runs transformers' `generate`; what it returns has `skip` tokens before each answer.

    Args:
        backbone: Whose model generates.
        reading: What it reads.
        skip: Tokens before an answer where transformers keeps what is generated.
        decoding: The options as `Backbone.generate` was given them.
    """
    model: Any = backbone.model
    options = {**told(backbone.codec, skip, decoding), "synced_gpus": False}  # processes need not end with each other
    # A static cache may compile what follows the first pass, and drafts read several tokens at a time.
    once = model.config.is_encoder_decoder or bool(decoding.get("cache_implementation")) or drafted(decoding)
    with embedded_as(backbone.stack if model.config.is_encoder_decoder else model, reading, once):
        return model.generate(input_ids=reading.ids, **reading.inputs, **options)


@contextmanager
def embedded_as(stack: PreTrainedModel, reading: Reading, once: bool = False) -> Iterator[None]:
    """Embeds the tokens of a reading as its rows have them, whatever their ids are.

    Args:
        stack: The model, or its encoder.
        reading: What it reads first, of which a cache may cover the beginning.
        once: Whether it reads them once. Else it reads all of them again whenever it runs without a cache.
    """
    embeds, length = reading.embeds, reading.ids.shape[1]
    is_first = True

    def replace(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        nonlocal is_first
        columns = out.shape[1]
        if not is_first and columns <= length:
            return None
        if once:
            handle.remove()
        is_first = False
        begin = max(length - columns, 0)  # columns in the cache
        rows = embeds[:, begin:].repeat_interleave(len(out) // len(embeds), dim=0)
        return torch.cat([rows.to(out), out[:, rows.shape[1] :]], dim=1)

    handle = stack.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def told(codec: Codec, skip: int, decoding: dict[str, Any]) -> dict[str, Any]:
    """Options of transformers' `generate`, where penalties and `stop` look at what is generated only.

    Raises:
        ValueError: If they are for a way of decoding that transformers has moved out, as code to be downloaded and run.
    """
    if foreign := sorted(name for name in ON_THE_HUB if decoding.get(name)):
        raise ValueError(
            f"{foreign} want code that transformers would download and run, which this project never does; take "
            f"beams (num_beams, num_return_sequences) or sampling"
        )
    options = {**GREEDY, "pad_token_id": codec.pad_id, **decoding}
    stop = options.pop("stop", None)
    wanted = {name: options.pop(name, None) for name in PENALTIES}
    penalties = [AnswerProcessor(PENALTIES[name](value), skip) for name, value in wanted.items() if value]
    stops = [AnswerStops(codec, stop, skip)] if stop else []
    return {
        **options,
        "logits_processor": LogitsProcessorList([*options.get("logits_processor", ()), *penalties]),
        "stopping_criteria": StoppingCriteriaList([*options.get("stopping_criteria", ()), *stops]),
    }


def drafted(decoding: dict[str, Any]) -> bool:
    """Whether drafts of several tokens are made and checked, by another model or by what was said before."""
    return any(decoding.get(name) for name in DRAFTED)


def sequences(decoding: dict[str, Any]) -> int:
    """How many sequences of a row run side by side."""
    return max(decoding.get("num_beams") or 1, decoding.get("num_return_sequences") or 1)


class AnswerProcessor(LogitsProcessor):  # type: ignore[misc]
    """A processor of logits that sees what is generated only.

    Args:
        inner: The processor.
        skip: Tokens before.
    """

    def __init__(self, inner: LogitsProcessor, skip: int) -> None:
        self.inner, self.skip = inner, skip

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The logits [B, V] of the next token."""
        return self.inner(input_ids[:, self.skip :], scores)


class AnswerStops(StoppingCriteria):  # type: ignore[misc]
    """Texts that stop an answer, looked for in what is generated only, whatever tokens they are made of.

    Args:
        codec: Of the backbone.
        stop: The texts.
        skip: Tokens before.
    """

    def __init__(self, codec: Codec, stop: Sequence[str], skip: int) -> None:
        self.codec, self.stop, self.skip = codec, tuple(stop), skip

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """[B] bool, whether a row has said one."""
        texts = self.codec.tokenizer.batch_decode(input_ids[:, self.skip :])
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)
