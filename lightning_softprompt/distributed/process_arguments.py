"""The arguments of this process, with which Lightning starts further processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import distributed

LAUNCHER_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by Lightning


@contextmanager
def set_process_arguments(argv: Sequence[str]) -> Iterator[None]:
    """Replace the arguments of the process by those of a run command, and restore the environment afterwards.

    Lightning starts further processes with the arguments of this one, so they must be those of the run command even if
    another command starts the run. It also leaves variables and a process group behind, which would stop the next run
    from starting processes of its own.
    """
    arguments, variables = sys.argv, {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    sys.argv = [*arguments[:1], *argv]
    try:
        yield
        if distributed.is_available() and distributed.is_initialized() and variables["LOCAL_RANK"] is None:
            distributed.destroy_process_group()
    finally:
        sys.argv = arguments
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
