"""Prints the command to run next, on standard error, after a command has succeeded."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_softprompt.system.printable import printable
from lightning_softprompt.system.trust import user_modules

QUIET_VARIABLE = "SOFTPROMPT_NO_HINTS"  # if set, no command is suggested
LABEL = "Next: "


def suggest(*commands: str) -> None:
    """Print commands that can be copied as printed, one per line.

    Args:
        commands: Complete command lines, as `command_line` returns them.
    """
    if not commands or os.environ.get(QUIET_VARIABLE):
        return
    indent = " " * len(LABEL)
    for number, command in enumerate(commands):
        prefix = indent if number else LABEL
        print(f"{prefix}{printable(command)}", file=sys.stderr)


@contextmanager
def suggest_nothing() -> Iterator[None]:
    """Context in which no command is suggested."""
    before = os.environ.get(QUIET_VARIABLE)
    os.environ[QUIET_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET_VARIABLE]
        else:
            os.environ[QUIET_VARIABLE] = before


def command_line(command: str, *words: str | Path) -> str:
    """A `softprompt` command as it is typed in a shell; paths below the current folder are relative.

    Modules that the user trusts are trusted again.

    >>> command_line("test", "--ckpt_path", "my runs/best.ckpt")
    "softprompt test --ckpt_path 'my runs/best.ckpt'"
    """
    texts = [str(short_path(word)) if isinstance(word, Path) else word for word in words]
    for module in user_modules():
        texts += ["--trust", module]
    return shlex.join(["softprompt", *command.split(), *texts])


def short_path(path: Path) -> Path:
    """A path relative to the current folder if it is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def pipe(text: str, command: str) -> str:
    r"""A command line that passes a text to a command on standard input.

    >>> pipe('{"text": "..."}', "softprompt predict --data.predict -")
    'echo \'{"text": "..."}\' | softprompt predict --data.predict -'
    """
    return f"echo {shlex.quote(text)} | {command}"
