"""Requests as rows of the engine: how a body becomes rows, and how their events are awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.serving.batching.jobs import Answer, Event, Job
from lightning_softprompt.serving.errors import RequestError, invalid, too_long
from lightning_softprompt.serving.registry import ServedPrompt
from lightning_softprompt.serving.schema import GenerationBody, Message

Row = str | Mapping[str, Any]
POLL = 0.25  # seconds between checks for a client that disconnects


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a request.

    Args:
        max_tokens: Largest number of new tokens of an answer.
        timeout: Seconds that a request may take.
    """

    max_tokens: int = 512
    timeout: float = 120.0


def row_of(served: ServedPrompt, text: str, columns: Mapping[str, str]) -> Row:
    """Returns the row of a completion: a text for the column that `columns` does not give.

    Raises:
        RequestError: If the columns are not those of the prompt.
    """
    if served.view.format.chat is not None:
        if columns:
            raise invalid(f"{served.name!r} answers dialogues, which have no columns", "columns")
        return text
    known = served.view.format.parsed.columns
    if unknown := sorted(set(columns) - set(known)):
        raise invalid(f"unknown columns {unknown[:5]}; {served.name!r} has {list(known)}", "columns")
    missing = [name for name in served.columns if name not in columns]
    if len(missing) != 1:
        given = "in `columns`" if len(served.columns) != 1 else "in `prompt`"
        raise invalid(
            f"{served.name!r} has the columns {list(served.columns)}; give all but one of them {given}", "columns"
        )
    return {**columns, missing[0]: text}


def row_of_chat(served: ServedPrompt, messages: Sequence[Message], columns: Mapping[str, str]) -> Row:
    """Returns the row of a chat: the dialogue, or the last message where the prompt was not trained on dialogues.

    Raises:
        RequestError: If the prompt cannot use the messages.
    """
    if served.view.format.chat is not None:
        return {"messages": [message.model_dump() for message in messages]}
    if len(messages) > 1 or messages[0].role != "user":
        message = (
            f"{served.name!r} was not trained on dialogues: send one user message, or use a prompt of "
            "InstructionDataModule"
        )
        raise invalid(message, "messages")
    return row_of(served, messages[0].content, columns)


def encode(served: ServedPrompt, row: Row, truncate: bool) -> tuple[Example, Encoded]:
    """Returns a row as text and as tokens.

    Raises:
        RequestError: If it lacks a column, or is too long and must not be truncated.
    """
    try:
        (batch,) = served.view.batches([row], 1)
    except ValueError as error:
        message = str(error).removeprefix("row 0: ")
        raise too_long(message) if "max_tokens" in message else invalid(message, "prompt") from error
    assert batch.examples is not None
    encoded = batch.require_encoded()[0]
    if encoded.num_truncated and not truncate:
        limit = served.view.format.max_tokens
        raise too_long(
            f"the row exceeds the {limit} tokens of training by {encoded.num_truncated}; shorten it or set truncate"
        )
    return batch.examples[0], encoded


def decoding_of(served: ServedPrompt, body: GenerationBody, max_tokens: int | None, limit: int) -> Decoding:
    """Returns how an answer is generated: the options of the prompt's training, replaced by those of the request.

    Raises:
        RequestError: If options contradict each other.
    """
    base = served.view.format.decoding or Decoding()
    options = {"top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p, "seed": body.seed}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if body.temperature is not None:
        is_greedy = body.temperature == 0
        changes |= {"do_sample": not is_greedy, "temperature": 1.0 if is_greedy else body.temperature}
        if is_greedy:
            changes |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    if body.stop_texts is not None:
        changes["stop"] = body.stop_texts
    if max_tokens is not None and max_tokens > limit:
        raise invalid(f"max_tokens must be at most {limit}, got {max_tokens}", "max_tokens")
    changes["max_new_tokens"] = min(base.most, limit) if max_tokens is None else max_tokens
    changes["min_new_tokens"] = min(base.min_new_tokens, changes["max_new_tokens"])
    try:
        return replace(base, **changes)
    except ValueError as error:
        raise invalid(str(error)) from error


def check_generation(served: ServedPrompt, body: GenerationBody, decoding: Decoding, has_logprobs: bool) -> None:
    """Refuses combinations that the server does not support.

    Raises:
        RequestError: With the reason.
    """
    if served.scores_answers:
        raise invalid(f"{served.name!r} is a reward model, which generates nothing", "model")
    if not served.prompt.backbone.model.can_generate():
        raise invalid(f"the backbone of {served.name!r} does not generate; use /v1/classify", "model")
    if body.stream and has_logprobs:
        raise invalid("logprobs are not supported with stream", "logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options requires stream", "stream_options")
    if decoding.num_beams > 1 and (body.n > 1 or body.stream or has_logprobs):
        raise invalid(f"{served.name!r} uses beam search, which supports neither n, stream nor logprobs", "model")


class Pending:
    """The rows of a request that are not finished.

    Args:
        limits: Limits of the request.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self.deadline = time.monotonic() + limits.timeout
        self.jobs: list[Job] = []
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(self, event: Event) -> None:
        """Receives an event from the thread of the engine."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, is_disconnected: Callable[[], Any]) -> AsyncIterator[Event]:
        """Yields events until all rows are finished. Rows are cancelled if the client disconnects or an error occurs.

        Args:
            is_disconnected: Returns whether the client is gone.

        Raises:
            RequestError: If a row fails or the time is over.
        """
        remaining = len(self.jobs)
        try:
            while remaining:
                try:
                    event = await asyncio.wait_for(self._events.get(), POLL)
                except TimeoutError:
                    if await is_disconnected():
                        return
                    if time.monotonic() > self.deadline:
                        raise RequestError(408, "the request took longer than --timeout", "timeout") from None
                    continue
                if event.error is not None:
                    raise event.error
                remaining -= event.result is not None
                yield event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Drops the rows that are not finished; those of the current batch end with the next token."""
        for job in self.jobs:
            job.is_cancelled = True

    async def results(self, is_disconnected: Callable[[], Any]) -> list[Any]:
        """Returns the results of all rows in order; fewer if the client disconnects."""
        results = {}
        async for event in self.events(is_disconnected):
            if event.result is not None:
                results[event.index] = event.result
        return [results[index] for index in sorted(results)]


def usage_of(jobs: Sequence[Job], num_answers: int, results: Sequence[Any]) -> dict[str, int]:
    """Returns the numbers of tokens of a request; the row of several answers counts once."""
    rows = jobs[::num_answers]
    prompt_tokens = sum(len(job.encoded.ids) - len(job.encoded.answers) for job in rows)
    new_tokens = sum(result.num_tokens for result in results if isinstance(result, Answer))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
