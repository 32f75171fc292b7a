"""The git commit of the current folder, for the records of runs."""

from __future__ import annotations

import subprocess

TIMEOUT = 5.0  # seconds; a repository on a slow network drive does not delay a run


def read_commit() -> str | None:
    """Return the commit of the repository of the current folder; None outside a repository or without git.

    The suffix `-dirty` marks changes of tracked files that the commit does not contain.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
