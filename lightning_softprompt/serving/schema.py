"""The bodies of requests. Unknown fields are refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


def _refuse_surrogates(text: str) -> str:
    """Refuses a text that no encoding can write, such as one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return text


UnicodeText = Annotated[str, AfterValidator(_refuse_surrogates)]
NonEmpty = Annotated[UnicodeText, StringConstraints(min_length=1)]
Columns = dict[UnicodeText, UnicodeText]


class Body(BaseModel):
    """Base class of all bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of streamed replies."""

    include_usage: bool = False


class GenerationBody(Body):
    """What both kinds of completions share. Options without a value are those of the prompt's training."""

    model: NonEmpty
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)] | None = None
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions | None = None
    columns: Columns = Field(default_factory=dict)
    truncate: bool = False

    @property
    def stop_texts(self) -> tuple[str, ...] | None:
        """Texts that end an answer, None for those of the prompt."""
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(GenerationBody):
    """The body of `POST /v1/completions`."""

    prompt: UnicodeText | Annotated[list[UnicodeText], Field(min_length=1, max_length=64)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: UnicodeText


class ChatBody(GenerationBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=5)


class ClassifyBody(Body):
    """The body of `POST /v1/classify`."""

    model: NonEmpty
    input: (
        UnicodeText
        | Annotated[
            list[UnicodeText | dict[UnicodeText, UnicodeText | list[UnicodeText]]], Field(min_length=1, max_length=256)
        ]
    )
    top_k: int | None = Field(None, ge=1)
    truncate: bool = False


class PromptBody(Body):
    """The body of `POST /v1/prompts`."""

    name: NonEmpty
    path: NonEmpty
