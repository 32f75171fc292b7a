"""Decoding options: how an answer is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.backbones.tokenization.codec import Codec

RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("at least 1", lambda value: value is None or value >= 1),
    "min_new_tokens": ("at least 0", lambda value: value >= 0),
    "temperature": ("above 0", lambda value: value > 0),
    "top_k": ("at least 0", lambda value: value >= 0),
    "top_p": ("above 0 and up to 1", lambda value: 0 < value <= 1),
    "min_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "num_beams": ("at least 1", lambda value: value >= 1),
    "repetition_penalty": ("above 0", lambda value: value > 0),
    "no_repeat_ngram_size": ("at least 0", lambda value: value >= 0),
}


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated: greedily by default, by sampling, or by beam search.

    Penalties apply to the answer only, in every family. (Transformers also counts the prompt of a decoder.)

    Args:
        max_new_tokens: Maximum tokens of an answer. None uses the number that the data module reserves for it, or 64.
        min_new_tokens: Minimum tokens of an answer.
        do_sample: Whether to sample tokens instead of choosing the most likely one.
        temperature: Divides the logits before sampling.
        top_k: Samples from this number of most likely tokens; 0 samples from all.
        top_p: Samples from the most likely tokens that together have this probability.
        min_p: Samples from tokens with at least this share of the probability of the most likely token.
        num_beams: Number of beams; 1 means no beam search.
        length_penalty: Values above 0 favor long answers in beam search, values below 0 short ones.
        early_stopping: Whether beam search ends as soon as there are as many complete answers as beams.
        repetition_penalty: Values above 1 make repeated tokens less likely.
        no_repeat_ngram_size: Sequences of this number of tokens occur at most once; 0 allows all.
        stop: Texts that end an answer. They are not part of it.
        seed: Seed of sampling.

    Raises:
        ValueError: If a value is out of its range, or an option of sampling or beam search is set without it.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (range_text, is_in_range) in RANGES.items():
            if not is_in_range(getattr(self, name)):
                raise ValueError(f"{name} must be {range_text}, got {getattr(self, name)}")
        if self.min_new_tokens > self.most:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.most}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a list of texts, none of them empty, got {self.stop!r}")
        has_sampling_options = (self.temperature, self.top_k, self.top_p, self.min_p) != (1.0, 0, 1.0, 0.0)
        if has_sampling_options and not self.do_sample:
            raise ValueError("temperature, top_k, top_p and min_p apply to sampling only; set do_sample to true")
        has_beam_options = (self.length_penalty, self.early_stopping) != (1.0, False)
        if has_beam_options and self.num_beams == 1:
            raise ValueError("length_penalty and early_stopping apply to beam search only; set num_beams above 1")

    @property
    def most(self) -> int:
        """Maximum tokens of an answer."""
        return 64 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def options(self) -> dict[str, Any]:
        """The options for `Backbone.generate`: those that differ from greedy decoding."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        changed.pop("seed", None)
        changed["max_new_tokens"] = self.most
        if self.do_sample:
            changed["top_k"] = self.top_k  # otherwise transformers samples from the top 50
        return changed

    def with_seed(self, seed: int) -> Decoding:
        """The same options with another seed of sampling."""
        return replace(self, seed=seed)

    def texts(self, codec: Codec, ids: Tensor) -> list[str]:
        """Answers [B, U] as text, without stop texts and what follows them."""
        return [self._cut_at_stop(text) for text in codec.decode(ids)]

    def are_finished(self, codec: Codec, ids: Tensor) -> list[bool]:
        """Whether each of the answers [B, U] ended by itself, not by the maximum number of tokens."""
        if ids.shape[1] < self.most:
            return [True] * len(ids)
        texts = codec.tokenizer.batch_decode(ids.masked_fill(ids < 0, codec.pad_id))
        ends = {*codec.stop, codec.pad_id}  # only answers that ended are padded
        last_tokens = ids[:, -1].tolist() if ids.shape[1] else []
        return [
            last in ends or any(stop in text for stop in self.stop)
            for last, text in zip(last_tokens, texts, strict=True)
        ]

    def _cut_at_stop(self, text: str) -> str:
        ends = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        return text[: min(ends)].strip() if ends else text

    @contextmanager
    def drawing(self, offset: int = 0) -> Iterator[None]:
        """Samples from the seed within the context, and restores the random state of the run afterwards.

        Args:
            offset: Added to the seed, so that batches sample independently.
        """
        if not self.do_sample:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + offset)
            yield
