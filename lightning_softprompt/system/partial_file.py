"""A file that is written line by line: if the run is killed, the same run resumes it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TextIO

from lightning_softprompt.system.atomic_files import refuse_special_file, write_file

log = logging.getLogger(__name__)
Identity = Mapping[str, Any]  # values by name that must be equal to resume a file

SHOWN = 60  # characters of a value that a message shows
PATIENCE = (
    12.0  # seconds; processes that loaded data for a run that was killed end within 5, and hold its file till then
)


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
        file = self._locked()
        rows, size = count_complete_lines(self.part, numbers)
        if rows and (reason := _foreign(self.part, identity)):
            self._keep(reason)
            file.close()
            file, rows, size = self._locked(), 0, 0
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
            if _foreign(part, identity) is None and _is_free(part):
                self._describe(identity)
                part.replace(self.part)
                identity_path(part).unlink()
                log.info("%s was unfinished, and is now %s", part, self.part)
                return

    def _locked(self) -> TextIO:
        file = self.part.open("a", encoding="utf-8")
        try:
            _lock(file)
            if not self.part.exists() or not os.path.samestat(os.fstat(file.fileno()), self.part.stat()):
                file.close()  # whoever held it has finished and renamed it
                return self._locked()
        except BlockingIOError:
            file.close()
            raise ValueError(f"another run is writing {self.part}; wait for its end, or name another file") from None
        except OSError:  # some file systems of clusters know no locks
            log.warning("%s cannot be locked here: see that no other run writes it", self.part)
        return file

    def _keep(self, reason: str) -> None:
        kept = next(p for n in count(1) if not (p := self.part.with_name(f"{self.part.name}.{n}")).exists())
        if identity_path(self.part).exists():
            identity_path(self.part).rename(identity_path(kept))
        self.part.rename(kept)
        log.warning("%s is begun anew, and what it held kept as %s: %s", self.part, kept, reason)

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
    except (ValueError, TypeError, LookupError):  # left by a machine that lost power
        return False


def _foreign(part: Path, identity: Identity | None) -> str | None:
    """Returns why a partial file cannot be resumed, or None."""
    if identity is None:
        return "only `softprompt predict` in a single process goes on with an unfinished file"
    try:
        saved = dict(json.loads(identity_path(part).read_bytes()))
    except (OSError, ValueError, TypeError):
        return f"{identity_path(part)}, which says what it belongs to, is missing or broken"
    here = json.loads(json.dumps(identity))
    changed = [name for name in sorted({*saved, *here}) if saved.get(name) != here.get(name)]
    told = [f"{name} was {_short(saved.get(name))} and is {_short(here.get(name))}" for name in changed]
    return ", ".join(told) or None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _lock(file: TextIO) -> None:
    deadline = monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() > deadline:
                raise
            sleep(0.1)


def _is_free(part: Path) -> bool:
    """Whether no run is writing a file, as far as the file system supports locks."""
    try:
        with part.open("a") as file:
            _lock(file)
    except OSError:
        return False
    return True
