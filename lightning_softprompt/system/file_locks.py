"""Locks of files and folders that only one process may write."""

from __future__ import annotations

import errno
import fcntl
import logging
from io import IOBase
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

log = logging.getLogger(__name__)
INTERVAL = 0.1  # seconds between attempts


def lock_file(file: IO[Any] | IOBase | int, path: Path, patience: float = 0.0, inherited: bool = True) -> None:
    """Locks an open file or folder for this process until it is closed.

    Some file systems of clusters do not support locks. On these, only a warning is logged.

    Args:
        file: The open file, or the descriptor of an open folder.
        path: Its path, for the warning.
        patience: Seconds to wait for another process.
        inherited: Whether child processes share the lock, which then lasts until they end, too.

    Raises:
        BlockingIOError: If another process has locked it.
    """
    lock = fcntl.flock if inherited else fcntl.lockf
    deadline = monotonic() + patience
    while True:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s cannot be locked on this file system (%s); make sure that no other process writes to it",
                    path,
                    error.strerror,
                )
                return
            if monotonic() >= deadline:
                raise BlockingIOError(error.errno, error.strerror, str(path)) from None
        sleep(INTERVAL)
