"""A file that is written line by line: if the run is killed, the same run resumes it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from lightning_softprompt.system.atomic_files import refuse_special_file, write_file
from lightning_softprompt.system.file_locks import lock_file

log = logging.getLogger(__name__)
Identity = Mapping[str, Any]  # values by name that must be equal to resume a file

SHOWN = 60  # characters of a value that a message shows
PATIENCE = 12.0  # seconds; the data workers of a killed run end within 5, and lock its file until then


class PartialFile:
    """JSON lines of rows in a known order in `<path>.part`; `<path>.part.json` contains their identity.

    Args:
        path: Name of the complete file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")

    def open(
        self, identity: Identity | None, earlier: Sequence[Path] = (), numbers: Sequence[int] | None = None
    ) -> tuple[TextIO, int]:
        """Opens the file and returns it with the number of rows written by a killed run with the same identity.

        The file of a run with another identity is renamed, and an incomplete last line is dropped.

        Args:
            identity: Identity of the rows; None starts a new file.
            earlier: Partial files of other runs; the first one with the same identity is continued.
            numbers: Row number of each line (default: counted from 0).

        Raises:
            OSError: If the file cannot be written.
            ValueError: If another run writes it, or it is a device or a pipe.
        """
        refuse_special_file(self.path)
        self.part.parent.mkdir(parents=True, exist_ok=True)
        if identity is not None and not self.part.exists():
            self._take_over(identity, earlier)
        file = self._open_locked()
        rows, size = count_complete_lines(self.part, numbers)
        if rows and (reason := _difference(self.part, identity)):
            self._set_aside(reason)
            file.close()
            file, rows, size = self._open_locked(), 0, 0
        file.truncate(size)
        self._describe(identity)
        if rows:
            log.info("resuming %s after %d rows", self.part, rows)
        return file, rows

    def finish(self) -> None:
        """Renames the complete file to its final name."""
        self.part.replace(self.path)
        identity_path(self.part).unlink(missing_ok=True)

    def _take_over(self, identity: Identity, earlier: Sequence[Path]) -> None:
        for part in earlier:
            if _difference(part, identity) is None and _is_free(part):
                self._describe(identity)
                part.replace(self.part)
                identity_path(part).unlink()
                log.info("renamed the incomplete file %s to %s", part, self.part)
                return

    def _open_locked(self) -> TextIO:
        """Opens and locks the partial file.

        Raises:
            ValueError: If another run writes it.
        """
        file = self.part.open("a", encoding="utf-8")
        try:
            lock_file(file, self.part, PATIENCE)
        except BlockingIOError:
            file.close()
            raise ValueError(f"another run is writing {self.part}; wait for its end, or name another file") from None
        is_current = self.part.exists() and os.path.samestat(os.fstat(file.fileno()), self.part.stat())
        if not is_current:  # the run that had locked the file has finished and renamed it
            file.close()
            return self._open_locked()
        return file

    def _set_aside(self, reason: str) -> None:
        """Renames the partial file of another run to the first free number."""
        name = self.part.name
        candidates = (self.part.with_name(f"{name}.{number}") for number in count(1))
        renamed = next(path for path in candidates if not path.exists())
        if identity_path(self.part).exists():
            identity_path(self.part).rename(identity_path(renamed))
        self.part.rename(renamed)
        log.warning("%s starts from the beginning; its earlier content is now in %s: %s", self.part, renamed, reason)

    def _describe(self, identity: Identity | None) -> None:
        if identity is None:
            identity_path(self.part).unlink(missing_ok=True)
        else:
            write_file(identity_path(self.part), f"{json.dumps(identity, indent=2, sort_keys=True)}\n".encode())


def identity_path(part: Path) -> Path:
    """Returns the path of the identity of a partial file."""
    return part.with_name(f"{part.name}.json")


def count_complete_lines(part: Path, numbers: Sequence[int] | None = None) -> tuple[int, int]:
    """Counts the complete lines in order at the start of a partial file, and their bytes."""
    rows = size = 0
    with part.open("rb") as file:
        for line, number in zip(file, count() if numbers is None else numbers, strict=False):
            if not _is_row(line, number):
                break
            rows, size = rows + 1, size + len(line)
    return rows, size


def _is_row(line: bytes, row: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["row"] == row
    except (ValueError, TypeError, LookupError):  # as after a power failure
        return False


def _difference(part: Path, identity: Identity | None) -> str | None:
    """Returns why a partial file cannot be resumed, or None."""
    if identity is None:
        return "only `softprompt predict` in a single process resumes an incomplete file"
    try:
        saved = dict(json.loads(identity_path(part).read_bytes()))
    except (OSError, ValueError, TypeError):
        return f"its identity {identity_path(part)} is missing or damaged"
    current = json.loads(json.dumps(identity))
    names = sorted({*saved, *current})
    pairs = [(name, saved.get(name), current.get(name)) for name in names]
    changes = [f"{name} was {_shorten(old)} and is {_shorten(new)}" for name, old, new in pairs if old != new]
    return ", ".join(changes) or None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _is_free(part: Path) -> bool:
    """Whether no run is writing a file, as far as the file system supports locks."""
    try:
        with part.open("a") as file:
            lock_file(file, part, PATIENCE)
    except OSError:
        return False
    return True
