"""Runs the server: loads backbone and prompts, listens, and ends gracefully."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.inference.prompt import load_prompt
from lightning_softprompt.serving.api import make_app
from lightning_softprompt.serving.batching.engine import BatchLimits, Engine
from lightning_softprompt.serving.errors import RequestError
from lightning_softprompt.serving.metrics import ServingMetrics
from lightning_softprompt.serving.registry import Registry
from lightning_softprompt.serving.service import ApiSettings
from lightning_softprompt.serving.warm_up import warm_up

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerSettings:
    """How the server listens and ends.

    Args:
        host: Address; other addresses than the loopback ones require a token.
        port: Port; 0 for a free one.
        grace: Seconds in which running requests may finish after SIGTERM.
        warm_up: Length in tokens of the rows that run before the first request; 0 for none.
        connections: Largest number of open connections and requests.
        api: Limits and access of the API.
        batches: How rows become batches.

    Raises:
        ValueError: If the address is not a loopback one and there is no token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grace: int = 30
    warm_up: int = 128
    connections: int = 1024
    api: ApiSettings = field(default_factory=ApiSettings)
    batches: BatchLimits = field(default_factory=BatchLimits)

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.api.tokens.users:
            raise ValueError(
                f"--host {self.host} can be reached from other machines and requires a token: set --token-file, or "
                "the variable SOFTPROMPT_TOKEN"
            )


def read_tokens(path: Path | None, variable: str) -> tuple[str, ...]:
    """Returns the tokens of a file, one per line, or the token in an environment variable.

    Raises:
        ValueError: If the file has no token, or a token is short or not printable ASCII.
    """
    if path is None:
        tokens = [os.environ[variable]] if os.environ.get(variable) else []
    else:
        tokens = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not tokens:
            raise ValueError(f"{path} has no token; write one per line")
    for token in tokens:
        if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(f"tokens of {path or variable} must be at least 8 printable ASCII characters, no spaces")
    return tuple(tokens)


def open_backbone(paths: Sequence[Path], options: Mapping[str, Any]) -> Backbone:
    """Loads the backbone that options describe, or the one that the first prompt names."""
    if options or not paths:
        return load_backbone(BackboneSpec(**options))
    return load_prompt(paths[0]).backbone


def make_server(prompts: Mapping[str, Path], backbone: Backbone, settings: ServerSettings) -> GracefulServer:
    """Returns a server of prompts, whose `run` ends at a signal.

    Args:
        prompts: Prompt files by name.
        backbone: Their backbone.
        settings: How the server listens and ends.

    Raises:
        ValueError: If a prompt cannot be loaded.
    """
    registry = Registry(backbone)
    for name, path in prompts.items():
        try:
            registry.add(name, path)
        except RequestError as error:
            raise ValueError(f"{name}={path}: {error.message}") from error
    engine = Engine(backbone, settings.batches, lambda rows: metrics.batch_rows.observe(rows))
    metrics = ServingMetrics(
        lambda: engine.num_waiting, lambda: engine.num_running, lambda: len(registry), lambda: registry.num_bytes
    )
    warm_up(engine, registry.prompts, settings.warm_up)
    engine.start()
    app = make_app(registry, engine, settings.api, metrics)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.grace,
        limit_concurrency=settings.connections,
        h11_max_incomplete_event_size=64 << 10,
    )
    return GracefulServer(config, app)


class GracefulServer(uvicorn.Server):
    """Ends with exit code 0 after a signal: running requests finish first; a second signal ends at once.

    Args:
        config: The configuration of uvicorn.
        app: The application, which reports that it is not ready from then on.
    """

    def __init__(self, config: uvicorn.Config, app: Any) -> None:
        super().__init__(config)
        self.app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Receives a signal."""
        self.app.state.is_draining = True
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        """Listens, and reports the address."""
        await super().startup(sockets)
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                print(f"Serving on http://{host}:{port}", flush=True)
