"""What happens around the endpoints: tokens and sizes of bodies are checked, requests are counted."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_softprompt.serving.errors import RequestError
from lightning_softprompt.serving.metrics import ServingMetrics

OPEN_PATHS = ("/health", "/ready")  # for probes, without a token
ADMIN_PATH = "/v1/prompts"
METERED = ("/v1/completions", "/v1/chat/completions", "/v1/classify", ADMIN_PATH)
CONTEXT = "softprompt"  # key of a scope


@dataclass(frozen=True)
class Tokens:
    """Bearer tokens.

    Args:
        users: Tokens that may use prompts; empty if everybody may.
        admins: Tokens that may also add and remove prompts; empty if nobody may.
    """

    users: Sequence[str] = field(default=(), repr=False)
    admins: Sequence[str] = field(default=(), repr=False)

    def check(self, path: str, authorization: str) -> None:
        """Refuses a request without a valid token.

        Raises:
            RequestError: With the reason.
        """
        if path in OPEN_PATHS:
            return
        scheme, _, token = authorization.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        is_admin_path = path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/")
        if is_admin_path and not self.admins:
            message = "prompts cannot be changed; start the server with --folder and --admin-token-file"
            raise RequestError(403, message, "admin_disabled")
        if not is_admin_path and not self.users:
            return
        allowed = self.admins if is_admin_path else (*self.users, *self.admins)
        if not _is_one_of(token, allowed):
            raise RequestError(401, "a valid bearer token is required", "invalid_api_key")


def _is_one_of(token: str, allowed: Sequence[str]) -> bool:
    """Compares digests of one length with all tokens, so that the time tells nothing about them."""
    digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
    matches = [hmac.compare_digest(digest, sha256(one.encode()).digest()) for one in allowed]
    return any(matches)


class Gatekeeper:
    """Checks the token and reads the body of a request, up to a limit of size and time.

    Args:
        app: The application.
        tokens: The tokens.
        max_body: Largest number of bytes.
        body_timeout: Seconds in which the body must arrive.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens, max_body: int, body_timeout: float) -> None:
        self.app, self.tokens, self.max_body, self.body_timeout = app, tokens, max_body, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or replies with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self.tokens.check(scope["path"], headers.get("authorization", ""))
            body = await self._read_body(headers, receive)
        except RequestError as error:
            close = {"Connection": "close"}  # the rest of the body is not read
            await JSONResponse(error.to_json(), error.status, {**error.headers, **close})(scope, receive, send)
            return
        if body is None:  # the client is gone
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > self.max_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RequestError(408, "the body of the request did not arrive in time", "timeout") from None

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body exceeds {self.max_body} bytes", "body_too_large")


@dataclass
class RequestContext:
    """What the endpoint of a request reports to the middleware.

    Args:
        prompt: The name of its prompt.
        on_end: Called when the reply ends, also if the client disconnects.
    """

    prompt: str = ""
    on_end: Callable[[], None] = lambda: None


def request_context(request: Request) -> RequestContext:
    """Returns the context of a request."""
    context: RequestContext = request.scope[CONTEXT]
    return context


class RequestMeter:
    """Counts requests, and drops what is left of a request when its reply ends.

    Args:
        app: The application.
        metrics: The metrics.
    """

    def __init__(self, app: ASGIApp, metrics: ServingMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = scope[CONTEXT] = RequestContext()
        start, status = time.monotonic(), 499  # of a client that disconnects before the reply

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            context.on_end()
            if scope["path"] in METERED:
                self.metrics.request_seconds.labels(scope["path"]).observe(time.monotonic() - start)
                self.metrics.requests.labels(context.prompt, scope["path"], str(status)).inc()
