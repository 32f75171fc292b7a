"""What transformers' own generation is told, so that it means the same in every family and however a row begins.

A soft prompt reaches it as embeddings, or as a cache with tokens in place of what is in it; those were never said, and
penalties and texts that stop must not look at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def generated(backbone: Backbone, embeds: Tensor, given: dict[str, Any], skip: int, decoding: dict[str, Any]) -> Tensor:
    """Answers by transformers' `generate`.

    Args:
        backbone: Whose model generates.
        embeds: [B, M, H] of what it reads, unless that is given as tokens.
        given: Masks, positions, cache, tokens.
        skip: Tokens that stand before an answer where transformers keeps what is generated.
        decoding: The options as `Backbone.generate` was given them.
    """
    if not drafted(decoding):
        given = given if "input_ids" in given else {**given, "inputs_embeds": embeds}
        return _run(backbone, given, skip, decoding)
    ids = torch.full(embeds.shape[:2], backbone.codec.pad_id, device=embeds.device)  # drafting wants tokens
    with embedded_as(backbone.stack, embeds):
        return _run(backbone, {**given, "input_ids": ids}, skip or embeds.shape[1], decoding)


def _run(backbone: Backbone, given: dict[str, Any], skip: int, decoding: dict[str, Any]) -> Tensor:
    model: Any = backbone.model
    options = {**told(backbone.codec, skip, decoding), "synced_gpus": False}  # processes need not end with each other
    return model.generate(**given, **options)[:, skip:]  # type: ignore[no-any-return]


@contextmanager
def embedded_as(stack: PreTrainedModel, embeds: Tensor) -> Iterator[None]:
    """Gives the first tokens that a stack reads inside these embeddings [B, M, H], whatever tokens they are."""
    read = False

    def replace(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        nonlocal read
        if read:
            return None
        read = True
        return torch.cat([embeds.to(out), out[:, embeds.shape[1] :]], dim=1)

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
