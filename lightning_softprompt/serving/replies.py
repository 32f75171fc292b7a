"""The bodies of replies, in the format of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.serving.batching.jobs import Answer, TokenLogprobs


class CompletionFormat:
    """Replies of `/v1/completions`."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, index: int, answer: Answer, codec: Codec, has_logprobs: bool) -> dict[str, Any]:
        """An answer."""
        logprobs = _completion_logprobs(answer.logprobs, codec) if has_logprobs else None
        return {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def piece(self, index: int, text: str, finish_reason: str | None, is_first: bool) -> dict[str, Any]:
        """A part of a streamed answer."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


class ChatFormat:
    """Replies of `/v1/chat/completions`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, answer: Answer, codec: Codec, has_logprobs: bool) -> dict[str, Any]:
        """An answer."""
        logprobs = {"content": [_chat_logprob(entry, codec) for entry in answer.logprobs]} if has_logprobs else None
        message = {"role": "assistant", "content": answer.text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def piece(self, index: int, text: str, finish_reason: str | None, is_first: bool) -> dict[str, Any]:
        """A part of a streamed answer."""
        delta: dict[str, str] = {"role": "assistant"} if is_first else {}
        if text or is_first:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


ReplyFormat = CompletionFormat | ChatFormat


class Reply:
    """The common fields of a reply and of its chunks.

    Args:
        form: The format.
        model: The name of the prompt.
    """

    def __init__(self, form: ReplyFormat, model: str) -> None:
        self.form = form
        self.common = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """A reply that is not streamed."""
        return {**self.common, "object": self.form.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> dict[str, Any]:
        """A part of a streamed reply."""
        chunk = {**self.common, "object": self.form.chunk_kind, "choices": choices}
        return chunk if usage is None else {**chunk, "usage": usage}


def classification_reply(
    model: str, records: Sequence[Mapping[str, Any]], top_k: int | None, prompt_tokens: int
) -> dict[str, Any]:
    """The reply of `/v1/classify`."""
    data = []
    for index, record in enumerate(records):
        scores = record["scores"]
        entry: dict[str, Any] = {"index": index, "label": record["prediction"]}
        if scores is not None:  # tags have none
            best = sorted(scores.items(), key=lambda item: -item[1])[:top_k]
            entry |= {"scores": dict(best), "probs": list(scores.values()), "num_classes": len(scores)}
        data.append(entry)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0, "total_tokens": prompt_tokens}
    shared = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
    return {**shared, "data": data, "usage": usage}


def _completion_logprobs(entries: Sequence[TokenLogprobs], codec: Codec) -> dict[str, Any]:
    tokens = [_text(entry.token, codec) for entry in entries]
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    top = [{_text(token, codec): value for token, value in entry.top.items()} for entry in entries]
    values = [entry.logprob for entry in entries]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _chat_logprob(entry: TokenLogprobs, codec: Codec) -> dict[str, Any]:
    top = [_token_logprob(token, value, codec) for token, value in entry.top.items()]
    return {**_token_logprob(entry.token, entry.logprob, codec), "top_logprobs": top}


def _token_logprob(token: int, value: float, codec: Codec) -> dict[str, Any]:
    text = _text(token, codec)
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _text(token: int, codec: Codec) -> str:
    return str(codec.tokenizer.decode([token]))
