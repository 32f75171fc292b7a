"""The rows that requests wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.serving.errors import RequestError
from lightning_softprompt.serving.registry import ServedPrompt


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a generated token and of the most likely ones at its position, before any sampling option.

    Args:
        token: The token.
        logprob: Its log-probability.
        top: Log-probabilities of the most likely tokens by their id.
    """

    token: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Args:
        text: The text, without what ended it.
        finish_reason: `stop` if it ended by itself or at a stop text, `length` at the maximum number of tokens.
        num_tokens: Generated tokens, including the token that ends the answer.
        logprobs: Log-probabilities of the tokens, if the request asked for them.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something that happened to a row.

    Args:
        index: The row in its request.
        piece: New text of its answer.
        result: Its answer, or the record of its class. The row is finished.
        error: Why there is no result. The row is finished.
    """

    index: int
    piece: str = ""
    result: Any = None
    error: RequestError | None = None


@dataclass(eq=False)
class Job:
    """A row that a request waits for.

    Args:
        served: Its prompt.
        example: The row as text.
        encoded: The row in tokens.
        deliver: Receives its events, from the thread of the engine.
        deadline: Time of `time.monotonic` after which it is dropped.
        index: The row in its request.
        is_cancelled: Whether nobody waits for it any more.
    """

    served: ServedPrompt
    example: Example
    encoded: Encoded
    deliver: Callable[[Event], None]
    deadline: float
    index: int = 0
    is_cancelled: bool = field(default=False, kw_only=True)
    is_finished: bool = field(default=False, kw_only=True)

    def finish(self, result: Any) -> None:
        """Delivers the result."""
        self._deliver_last(Event(self.index, result=result))

    def fail(self, error: RequestError) -> None:
        """Delivers an error."""
        self._deliver_last(Event(self.index, error=error))

    def _deliver_last(self, event: Event) -> None:
        if not self.is_finished:
            self.is_finished = True
            self.deliver(event)

    @property
    def is_dropped(self) -> bool:
        """Whether it is cancelled or late. A late row is reported."""
        if not self.is_cancelled and time.monotonic() > self.deadline:
            self.is_cancelled = True
            self.fail(RequestError(408, "the request took longer than the server's --timeout", "timeout"))
        return self.is_cancelled


@dataclass(eq=False)
class ClassificationJob(Job):
    """A row whose class is predicted."""


@dataclass(eq=False)
class GenerationJob(Job):
    """A row whose answer is generated.

    Args:
        decoding: How the answer is generated.
        num_logprobs: Number of most likely tokens to report at each position; None for no log-probabilities.
        is_streamed: Whether pieces of the answer are delivered.
    """

    decoding: Decoding = field(default_factory=Decoding, kw_only=True)
    num_logprobs: int | None = field(default=None, kw_only=True)
    is_streamed: bool = field(default=False, kw_only=True)
