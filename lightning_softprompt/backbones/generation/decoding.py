"""How an answer is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
    """How an answer is generated. Greedily, unless it is sampled or searched by beams.

    Penalties look at the answer alone, in every family (of itself, transformers counts a decoder's question as well).

    Args:
        max_new_tokens: Most tokens of an answer; None takes as many as the data sets aside for it, else 64.
        min_new_tokens: Fewest tokens of an answer.
        do_sample: Whether tokens are drawn; else the likeliest is taken.
        temperature: Divides the logits before they are drawn from.
        top_k: Draws among so many likeliest tokens; 0 among all.
        top_p: Draws among the likeliest tokens that together have this probability.
        min_p: Draws among tokens that have this share of the likeliest one's probability.
        num_beams: Answers kept at each step; 1 searches no beams.
        length_penalty: Above 0 favours long answers among beams, below 0 short ones.
        early_stopping: Whether the search ends with as many whole answers as there are beams.
        repetition_penalty: Above 1 makes what was said less likely.
        no_repeat_ngram_size: Sequences of so many tokens come up once at most; 0 allows all.
        stop: Texts that end an answer, and are left out of it.
        seed: Of what is drawn.

    Raises:
        ValueError: If a value is out of its range, or one is given for sampling or beams without them.
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
        for name, (told, fits) in RANGES.items():
            if not fits(getattr(self, name)):
                raise ValueError(f"{name} must be {told}, got {getattr(self, name)}")
        if self.min_new_tokens > self.most:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.most}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a list of texts, none of them empty, got {self.stop!r}")
        drawn = (self.temperature, self.top_k, self.top_p, self.min_p) != (1.0, 0, 1.0, 0.0)
        if drawn and not self.do_sample:
            raise ValueError("temperature, top_k, top_p and min_p shape what is drawn; set do_sample to true")
        if (self.length_penalty, self.early_stopping) != (1.0, False) and self.num_beams == 1:
            raise ValueError("length_penalty and early_stopping are for beams; set num_beams above 1")

    @property
    def most(self) -> int:
        """Most tokens of an answer."""
        return 64 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def options(self) -> dict[str, Any]:
        """What `Backbone.generate` takes: all that differs from greedy decoding."""
        wanted = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        wanted.pop("seed", None)
        return {**wanted, "max_new_tokens": self.most, **({"top_k": self.top_k} if self.do_sample else {})}

    def texts(self, codec: Codec, ids: Tensor) -> list[str]:
        """Answers [B, U] as text, up to where they stop."""
        return [self._stopped(text) for text in codec.decode(ids)]

    def _stopped(self, text: str) -> str:
        ends = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return text[: min(ends)].strip() if ends else text

    @contextmanager
    def drawing(self, offset: int = 0) -> Iterator[None]:
        """Draws inside come from the seed, and leave the run's own random numbers as they were."""
        if not self.do_sample:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + offset)
            yield
