"""Atomic writes of files and folders, and paths in the home folder."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
STALE = 3600  # seconds, far longer than writing any draft takes
HOME = re.compile(r"~(/[^{}\n]*)?")  # a path in the home folder; no template


def expand_home(argv: Sequence[str]) -> list[str]:
    """Expands `~` at the start of values: a shell does so for `--option ~/x`, but not for `--option=~/x`."""
    expanded = []
    for word in argv:
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(f"{option}{sign}{expand_home_in(value)}")
    return expanded


def expand_home_in(value: Any) -> Any:
    """Expands `~` at the start of strings that may be paths, also inside mappings and lists."""
    if isinstance(value, str):
        return os.path.expanduser(value) if HOME.fullmatch(value) else value
    if isinstance(value, Mapping):
        return {name: expand_home_in(part) for name, part in value.items()}
    if isinstance(value, list):
        return [expand_home_in(part) for part in value]
    return value


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Creates a folder with `write` atomically, also if several processes create it or one is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(".draft-*"):  # left by a killed process
        if time.time() - stale.stat().st_mtime > STALE:
            shutil.rmtree(stale, ignore_errors=True)
    draft = folder.parent / f".draft-{secrets.token_hex(8)}"
    draft.mkdir()  # with the usual permissions, unlike tempfile's folders, which other users cannot read
    try:
        write(draft)
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process created the same folder
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_special_file(path: Path) -> None:
    """Refuses a path that is not a regular file, since writing a file replaces what is at its path.

    A superuser would otherwise replace `/dev/null`, for all processes of the machine.

    Raises:
        ValueError: Naming the path.
    """
    absolute = path.absolute()
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    is_device = str(absolute.parent) in ("/dev", "/dev/fd")
    is_process_file = absolute.parts[:2] == ("/", "proc")
    if is_special or is_device or is_process_file:
        raise ValueError(f"{path} is a device or a pipe, which a file would replace; use a regular file")


def write_file(path: Path, content: bytes) -> None:
    """Writes a file atomically; see `write_file_with`."""
    write_file_with(path, lambda part: part.write_bytes(content))


def write_file_with(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: a reader sees the old or the new content, never a part.

    Args:
        path: The file.
        write: Writes a temporary file, which is then renamed.

    Raises:
        OSError: If the file cannot be written, naming it. No partial file remains.
        ValueError: If it is a device or a pipe.
    """
    refuse_special_file(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with default_permissions(part):
            write(part)
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def default_permissions(path: Path) -> Iterator[None]:
    """Context in which the file is written; it gets the default permissions of a new file, whatever the writer sets."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def write_if_possible(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of an optional cache atomically; a failure is only logged.

    Args:
        path: The file.
        write: Writes a temporary file, which is then renamed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as draft:  # several processes may write the file at once
            part = Path(draft) / f"part{path.suffix}"
            with default_permissions(part):
                write(part)
            os.replace(part, path)
    except OSError as error:
        log.warning("%s cannot be written (%s); it is an optional cache, the run continues without it", path, error)
