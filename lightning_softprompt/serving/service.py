"""What the endpoints do: OpenAI's completions and chat, classification, and the prompts themselves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from lightning_softprompt.serving.batching.engine import Engine
from lightning_softprompt.serving.batching.jobs import Answer, ClassificationJob, GenerationJob
from lightning_softprompt.serving.errors import RequestError, invalid
from lightning_softprompt.serving.metrics import ServingMetrics
from lightning_softprompt.serving.middleware import Tokens, request_context
from lightning_softprompt.serving.prompt_folder import PromptFolder
from lightning_softprompt.serving.registry import Registry, ServedPrompt
from lightning_softprompt.serving.replies import ChatFormat, CompletionFormat, Reply, ReplyFormat, classification_reply
from lightning_softprompt.serving.requests import (
    Pending,
    RequestLimits,
    Row,
    check_generation,
    decoding_of,
    encode,
    row_of,
    row_of_chat,
    usage_of,
)
from lightning_softprompt.serving.schema import ChatBody, ClassifyBody, CompletionBody, GenerationBody, PromptBody


@dataclass(frozen=True)
class ApiSettings:
    """Limits and access of the API.

    Args:
        tokens: Bearer tokens.
        folder: Folder of prompts that may be added; None if none may.
        limits: Limits of a request.
        max_body: Largest body in bytes.
        body_timeout: Seconds in which a body must arrive.
    """

    tokens: Tokens = field(default_factory=Tokens)
    folder: PromptFolder | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)
    max_body: int = 1 << 20
    body_timeout: float = 30.0


class Service:
    """The operations behind the endpoints.

    Args:
        registry: The prompts.
        engine: Runs rows.
        settings: Limits and access.
        metrics: Counts requests and tokens.
    """

    def __init__(self, registry: Registry, engine: Engine, settings: ApiSettings, metrics: ServingMetrics) -> None:
        self.registry, self.engine, self.settings, self.metrics = registry, engine, settings, metrics
        self._encoding = asyncio.Lock()  # tokenizers are used by one thread at a time

    async def encode(self, served: ServedPrompt, row: Row, truncate: bool) -> Any:
        """Encodes a row in another thread, so that long texts do not delay other requests."""
        async with self._encoding:
            return await asyncio.to_thread(encode, served, row, truncate)

    async def complete(self, request: Request, body: CompletionBody) -> Response:
        """Answers `POST /v1/completions`."""
        served = self._find(request, body.model)
        rows = [row_of(served, text, body.columns) for text in body.prompts]
        return await self._generate(request, served, body, rows, CompletionFormat(), body.max_tokens, body.logprobs)

    async def chat(self, request: Request, body: ChatBody) -> Response:
        """Answers `POST /v1/chat/completions`."""
        served = self._find(request, body.model)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise invalid("max_tokens and max_completion_tokens exclude each other", "max_completion_tokens")
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs requires logprobs", "top_logprobs")
        max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        row = row_of_chat(served, body.messages, body.columns)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await self._generate(request, served, body, [row], ChatFormat(), max_tokens, num_logprobs)

    async def classify(self, request: Request, body: ClassifyBody) -> Response:
        """Answers `POST /v1/classify`."""
        served = self._find(request, body.model)
        if served.view.evaluation is None:
            raise invalid(f"{served.name!r} has no classes; use /v1/completions", "model")
        rows = [body.input] if isinstance(body.input, str) else body.input
        pending = self._pending(request)
        for index, row in enumerate(rows):
            example, encoded = await self.encode(served, row, body.truncate)
            job = ClassificationJob(served, example, encoded, pending.deliver, pending.deadline, index)
            pending.jobs.append(job)
        self.engine.submit(self.engine.classification, pending.jobs)
        records = await pending.results(request.is_disconnected)
        usage = usage_of(pending.jobs, 1, records)
        self._count_tokens(served, usage)
        return JSONResponse(classification_reply(served.name, records, body.top_k, usage["prompt_tokens"]))

    async def add(self, request: Request, body: PromptBody) -> Response:
        """Answers `POST /v1/prompts`: adds a prompt, or replaces the one of the same name."""
        if self.settings.folder is None:
            raise RequestError(403, "prompts cannot be added; start the server with --folder", "admin_disabled")
        path = self.settings.folder.find(body.path)
        is_swap = any(served.file == body.name for served in self.registry.prompts)
        added = await asyncio.wrap_future(
            self.engine.call(partial(self.registry.add, body.name, path, standalone=True))
        )
        self.metrics.swaps.inc(is_swap)
        return JSONResponse({"object": "list", "data": [served.describe() for served in added]})

    async def remove(self, request: Request, name: str) -> Response:
        """Answers `DELETE /v1/prompts/NAME`."""
        await asyncio.wrap_future(self.engine.call(partial(self.registry.remove, name)))
        self.metrics.swaps.inc()
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def _find(self, request: Request, name: str) -> ServedPrompt:
        served = self.registry.get(name)
        request_context(request).prompt = name  # the label of metrics: only names of prompts reach this line
        return served

    def _pending(self, request: Request) -> Pending:
        """The rows of a request, which are cancelled when its reply ends."""
        pending = Pending(self.settings.limits)
        request_context(request).on_end = pending.cancel
        return pending

    async def _generate(
        self,
        request: Request,
        served: ServedPrompt,
        body: GenerationBody,
        rows: Sequence[Row],
        form: ReplyFormat,
        max_tokens: int | None,
        num_logprobs: int | None,
    ) -> Response:
        decoding = decoding_of(served, body, max_tokens, self.settings.limits.max_tokens)
        check_generation(served, body, decoding, num_logprobs is not None)
        pending = self._pending(request)
        for row in rows:
            example, encoded = await self.encode(served, row, body.truncate)
            for number in range(body.n):
                place = (pending.deliver, pending.deadline, len(pending.jobs))
                job = GenerationJob(
                    served,
                    example,
                    encoded,
                    *place,
                    decoding=decoding.with_seed(decoding.seed + number),
                    num_logprobs=num_logprobs,
                    is_streamed=body.stream,
                )
                pending.jobs.append(job)
        self.engine.submit(self.engine.generation, pending.jobs)
        reply = Reply(form, served.name)
        if body.stream:
            return await self._stream(request, served, body, pending, reply)
        start = time.monotonic()
        answers: list[Answer] = await pending.results(request.is_disconnected)
        self.metrics.first_token_seconds.observe(time.monotonic() - start)
        usage = usage_of(pending.jobs, body.n, answers)
        self._count_tokens(served, usage)
        codec, has_logprobs = served.prompt.backbone.codec, num_logprobs is not None
        choices = [form.choice(index, answer, codec, has_logprobs) for index, answer in enumerate(answers)]
        return JSONResponse(reply.whole(choices, usage))

    async def _stream(
        self, request: Request, served: ServedPrompt, body: GenerationBody, pending: Pending, reply: Reply
    ) -> Response:
        """Replies with server-sent events. Errors before the first text are replies with their own status."""
        start = time.monotonic()
        events = pending.events(request.is_disconnected)
        first = await anext(events, None)
        self.metrics.first_token_seconds.observe(time.monotonic() - start)

        async def lines() -> AsyncIterator[str]:
            begun: set[int] = set()
            answers = []
            event = first
            try:
                while event is not None:
                    is_last = event.result is not None
                    if is_last:
                        answers.append(event.result)
                    reason = event.result.finish_reason if is_last else None
                    piece = reply.form.piece(event.index, event.piece, reason, event.index not in begun)
                    begun.add(event.index)
                    yield _line(reply.chunk([piece]))
                    event = await anext(events, None)
            except RequestError as error:
                yield _line(error.to_json())
                return
            finally:
                await events.aclose()  # type: ignore[attr-defined]
            usage = usage_of(pending.jobs, body.n, answers)
            self._count_tokens(served, usage)
            if body.stream_options is not None and body.stream_options.include_usage:
                yield _line(reply.chunk([], usage))
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def _count_tokens(self, served: ServedPrompt, usage: dict[str, int]) -> None:
        name = served.name
        self.metrics.tokens.labels(name, "prompt").inc(usage["prompt_tokens"])
        self.metrics.tokens.labels(name, "generated").inc(usage["completion_tokens"])


def _line(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"
