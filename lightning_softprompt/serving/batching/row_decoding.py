"""Decoding options of each row of a batch, so that requests with different options run together.

Transformers' `generate` applies its options to a whole batch. Here, a logits processor applies the options of each
row, samples from a generator of that row alone, and leaves one possible token; a stopping criterion ends each row by
its own rules. A sampled answer therefore depends on the request and its seed, not on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.inference.streaming import complete_words
from lightning_softprompt.serving.batching.jobs import Answer, Event, GenerationJob, TokenLogprobs


class DividedRowsError(RuntimeError):
    """The backbone runs the rows of a batch in several parts, so that rows cannot be told apart."""


class RowDecoder:
    """The answer of one row while it is generated.

    Args:
        job: The row.
        codec: The codec of the backbone.
        ends: Tokens that end an answer.
    """

    def __init__(self, job: GenerationJob, codec: Codec, ends: frozenset[int]) -> None:
        self.job, self.codec, self.ends = job, codec, ends
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.is_done = False
        self._streamed = ""
        self._distribution: Tensor | None = None  # [V] log-probabilities of the next token
        self._generator = torch.Generator().manual_seed(job.decoding.seed) if job.decoding.do_sample else None
        self._processors = _processors(job.decoding)
        self._min_tokens = job.decoding.min_new_tokens

    def choose(self, answer: Tensor, logits: Tensor) -> Tensor:
        """The logits [V] of the next token, from which `generate` takes the largest.

        Args:
            answer: [U] tokens so far.
            logits: [V] of the backbone.
        """
        if self.job.num_logprobs is not None:
            self._distribution = logits.float().log_softmax(-1)
        if len(answer) < self._min_tokens:
            logits = logits.index_fill(0, torch.tensor(sorted(self.ends), device=logits.device), float("-inf"))
        for processor in self._processors:
            logits = processor(answer[None], logits[None])[0]
        if self._generator is None:
            return logits
        probabilities = logits.float().softmax(-1).cpu()
        token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        only = torch.full_like(logits, float("-inf"))
        only[token] = 0.0
        return only

    def append(self, token: int) -> None:
        """Adds a generated token, delivers what is new, and finishes the job at the end of the answer."""
        if self.is_done:
            return
        if self.job.is_dropped:
            self.is_done = True
            return
        self.ids.append(token)
        if self._distribution is not None:
            self.logprobs.append(self._read_logprobs(token, self._distribution))
        reason = self._finish_reason(token)
        if reason is not None:
            self.is_done = True
            self._stream(self._text, is_finished=True)
            self.job.finish(Answer(self._text, reason, len(self.ids), tuple(self.logprobs)))
        elif self.job.is_streamed:
            self._stream(complete_words(self._text, self.job.decoding.stop), is_finished=False)

    @property
    def _text(self) -> str:
        (text,) = self.job.decoding.texts(self.codec, torch.tensor([self.ids]))
        return text

    def _finish_reason(self, token: int) -> Literal["stop", "length"] | None:
        if token in self.ends:
            return "stop"
        if self.job.decoding.stop:
            text = self.codec.tokenizer.decode(self.ids)
            if any(stop in text for stop in self.job.decoding.stop):
                return "stop"
        return "length" if len(self.ids) >= self.job.decoding.most else None

    def _stream(self, text: str, is_finished: bool) -> None:
        """Delivers the new part of a text. Pieces never change what they continue."""
        if not self.job.is_streamed or not text.startswith(self._streamed):
            return
        piece = text[len(self._streamed) :]
        if piece or is_finished:
            self._streamed = text
            self.job.deliver(Event(self.job.index, piece=piece))

    def _read_logprobs(self, token: int, distribution: Tensor) -> TokenLogprobs:
        values, ids = distribution.topk(min(self.job.num_logprobs or 0, len(distribution)))
        return TokenLogprobs(token, float(distribution[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))


class BatchDecoder:
    """Decodes the rows of a batch. Gives the options of `Backbone.generate`.

    Args:
        rows: The rows of the batch, in order.
        after_token: Called after each token.
    """

    def __init__(self, rows: Sequence[RowDecoder], after_token: Callable[[], None] = lambda: None) -> None:
        self.rows = rows
        self.after_token = after_token
        self._skip: int | None = None  # tokens before the answers

    @property
    def options(self) -> dict[str, Any]:
        """Options of `Backbone.generate`."""
        return {
            "max_new_tokens": max(row.job.decoding.most for row in self.rows),
            "logits_processor": [_Choose(self)],
            "stopping_criteria": [_Stop(self)],
        }

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The logits [B, V] of the next tokens.

        Raises:
            DividedRowsError: If the backbone does not run all rows together.
        """
        if len(logits) != len(self.rows):
            raise DividedRowsError(f"the backbone runs {len(logits)} of {len(self.rows)} rows together")
        if self._skip is None:
            self._skip = ids.shape[1]
        answers = ids[:, self._skip :]
        pairs = zip(self.rows, answers, logits, strict=True)
        chosen = [lg if row.is_done else row.choose(answer, lg) for row, answer, lg in pairs]
        return torch.stack(chosen)

    def append(self, ids: Tensor) -> Tensor:
        """Adds the last tokens of [B, M] to the answers; returns whether each row [B] is done."""
        for row, token in zip(self.rows, ids[:, -1].tolist(), strict=True):
            row.append(token)
        self.after_token()
        return torch.tensor([row.is_done for row in self.rows], device=ids.device)


class _Choose(LogitsProcessor):  # type: ignore[misc]
    """Passes the logits to a `BatchDecoder`."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The logits [B, V] of the next token."""
        return self.decoder.choose(input_ids, scores)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Passes the tokens to a `BatchDecoder`."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """[B] bool, whether each row is done."""
        return self.decoder.append(input_ids)


def _processors(decoding: Decoding) -> list[Any]:
    """The logits processors of transformers for the options of one row."""
    processors: list[Any] = []
    if decoding.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    if not decoding.do_sample:
        return processors
    if decoding.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        processors.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        processors.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        processors.append(MinPLogitsWarper(decoding.min_p))
    return processors
