"""Checks in the background whether the hosts that a run may connect to are reachable."""

from __future__ import annotations

import netrc
import os
import socket
from pathlib import Path
from threading import Thread
from time import monotonic
from urllib.parse import urlsplit

TIMEOUT = 2.0  # seconds


class Host:
    """A host whose reachability is checked in the background.

    Args:
        url: Address of the host; empty if there is none.
        connect: Whether to connect at all.
    """

    def __init__(self, url: str, connect: bool = True) -> None:
        self.url = url
        self._connects = connect and bool(urlsplit(url).hostname)
        self._answered = False
        self._thread = Thread(target=self._connect, daemon=True)  # a name server may take longer than the timeout
        self._deadline = monotonic() + TIMEOUT
        if self._connects:
            self._thread.start()

    def reachable(self) -> bool:
        """Whether the host accepted a connection within the timeout."""
        if self._connects:
            self._thread.join(max(0.0, self._deadline - monotonic()))
        return self._answered

    def state(self) -> str:
        """Describes the result of the check."""
        if not self._connects:
            return "not checked: offline by the environment" if self.url else "not checked"
        if self.reachable():
            return "reachable"
        proxy = "; a proxy is set, which was not used" if _has_proxy(self.url) else ""
        return f"not reachable{proxy}"

    def _connect(self) -> None:
        parts = urlsplit(self.url)
        port = parts.port or (80 if parts.scheme == "http" else 443)
        try:
            with socket.create_connection((parts.hostname or "", port), TIMEOUT):
                self._answered = True
        except OSError:
            self._answered = False


def hub() -> Host:
    """Returns the hub of models and data sets."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return Host(os.environ.get("HF_ENDPOINT", ""))
    return Host(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, connect=not constants.HF_HUB_OFFLINE)


def hub_cache() -> Path:
    """Returns the cache folder of the hub's client."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(constants.HF_HUB_CACHE)


def wandb() -> Host:
    """Returns the host that W&B logs to."""
    url = os.environ.get("WANDB_BASE_URL")
    offline = os.environ.get("WANDB_MODE") in {"offline", "disabled", "dryrun"}
    return Host(url or _wandb_default(), connect=not offline)


def has_wandb_key(url: str) -> bool:
    """Whether a key for W&B's host is set in the environment or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    host = urlsplit(url).hostname or ""
    return any(_names(file.expanduser(), host) for file in files)


def _names(file: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False


def _wandb_default() -> str:
    try:
        from wandb import Settings
    except ImportError:
        return ""
    return str(Settings.model_fields["base_url"].default)


def _has_proxy(url: str) -> bool:
    names = (f"{urlsplit(url).scheme}_proxy", "all_proxy")
    return any(os.environ.get(name) or os.environ.get(name.upper()) for name in names)
