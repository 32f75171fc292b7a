"""Errors of a request, as the reply reports them."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that the server refuses or cannot finish.

    Args:
        status: The HTTP status.
        message: The reason, for the client.
        code: A short name of the reason.
        param: The field of the request, if there is one.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def to_json(self) -> dict[str, Any]:
        """The body of the reply, in the format of OpenAI's errors."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        message = self.message.encode("utf-8", "backslashreplace").decode()  # names of fields may hold lone surrogates
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> RequestError:
    """A request with a wrong value."""
    return RequestError(400, message, code, param)


def too_long(message: str) -> RequestError:
    """A row that does not fit."""
    return RequestError(400, message, "context_length_exceeded", "prompt")


def overloaded(message: str) -> RequestError:
    """A request that the queue has no room for."""
    return RequestError(429, message, "queue_full", retry_after=1)
