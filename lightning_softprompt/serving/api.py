"""The HTTP application: endpoints, and what a client sees of an error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lightning_softprompt.serving.batching.engine import Engine
from lightning_softprompt.serving.errors import RequestError, invalid
from lightning_softprompt.serving.metrics import ServingMetrics
from lightning_softprompt.serving.middleware import Gatekeeper, RequestMeter
from lightning_softprompt.serving.registry import Registry
from lightning_softprompt.serving.service import ApiSettings, Service

log = logging.getLogger(__name__)


def make_app(registry: Registry, engine: Engine, settings: ApiSettings, metrics: ServingMetrics) -> Any:
    """Returns the ASGI application. Its shutdown stops the engine.

    Args:
        registry: The prompts.
        engine: Runs rows; it must have been started.
        settings: Limits and access.
        metrics: Counts requests and tokens.
    """
    service = Service(registry, engine, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="softprompt serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.is_draining = False
    _add_error_handlers(app)
    _add_endpoints(app, service)

    app.add_middleware(
        Gatekeeper, tokens=settings.tokens, max_body=settings.max_body, body_timeout=settings.body_timeout
    )
    app.add_middleware(RequestMeter, metrics=metrics)  # the outermost: it also counts refused requests
    return app


def _add_endpoints(app: FastAPI, service: Service) -> None:
    async def models() -> Any:
        return {"object": "list", "data": [served.describe() for served in service.registry.prompts]}

    async def model(name: str) -> Any:
        return service.registry.get(name).describe()

    async def health() -> Any:
        return {"status": "ok"}

    async def ready() -> Any:
        if app.state.is_draining or not service.engine.is_alive:
            raise RequestError(503, "the server is not ready", "not_ready", retry_after=5)
        return {"status": "ready", "prompts": len(service.registry)}

    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.post("/v1/completions")(service.complete)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/classify")(service.classify)
    app.get("/v1/models")(models)
    app.get("/v1/models/{name}")(model)
    app.post("/v1/prompts")(service.add)
    app.delete("/v1/prompts/{name}")(service.remove)
    app.get("/health")(health)
    app.get("/ready")(ready)
    app.get("/metrics")(metrics)


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(request: Request, error: Any) -> Response:
        return JSONResponse(error.to_json(), error.status, error.headers)

    async def malformed(request: Request, error: Any) -> Response:
        return await refused(request, _describe_first(error))

    async def unknown_path(request: Request, error: Any) -> Response:
        code = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
        return await refused(request, RequestError(error.status_code, str(error.detail), code))

    async def failed(request: Request, error: Any) -> Response:
        log.error("a request to %s failed", request.url.path, exc_info=error)
        return await refused(request, RequestError(500, "the server failed", "internal_error"))

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, unknown_path)
    app.add_exception_handler(Exception, failed)


def _describe_first(error: RequestValidationError) -> RequestError:
    """Names the field of the first mistake in a body."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(parts)[:200]
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field {name!r}", name, "unknown_field")
    if first["type"] == "model_attributes_type" and not parts:
        return invalid("the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json")
    if first["type"] == "json_invalid":
        return invalid("the body is not valid JSON", code="invalid_json")
    return invalid(f"{name or 'body'}: {first['msg']}"[:500], name or None)
