"""Records of rows as JSON lines, in the order of the data, in a file or on standard output."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from lightning.pytorch import Trainer

from lightning_softprompt.distributed.collectives import gather_objects
from lightning_softprompt.system.partial_file import Identity, PartialFile, count_complete_lines
from lightning_softprompt.system.printable import printable

log = logging.getLogger(__name__)
Records = Mapping[int, Mapping[str, Any]]  # by position in the order of the data
T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)


class UnwritableError(OSError):
    """Lines that cannot be written. The message names the file, the rows that it has, and how to continue."""


class ReaderGoneError(BrokenPipeError):
    """The program that reads standard output, such as `head`, has closed it."""


class RecordLines:
    """JSON lines, ordered by row, that the first process writes for all.

    Args:
        path: The file, whose name ends with `.part` until it is complete; or `-` for standard output.
    """

    def __init__(self, path: Path | Literal["-"]) -> None:
        self._partial = None if path == "-" else PartialFile(Path(path))
        self._file: TextIO | None = None
        self._waiting: dict[int, str] = {}  # lines of rows that follow a missing row
        self._next = 0
        self._is_resumable = False  # whether the same command continues the incomplete file
        self._rows: Sequence[int] | None = None

    def open(
        self,
        trainer: Trainer,
        identity: Identity | None = None,
        earlier: Sequence[Path] = (),
        rows: Sequence[int] | None = None,
    ) -> int:
        """Opens the file, as `PartialFile.open` does; returns the position of the first record that is needed.

        Raises:
            UnwritableError: If the file cannot be written.
        """
        self.leave()
        self._waiting, self._next, self._is_resumable, self._rows = {}, 0, identity is not None, rows
        if not trainer.is_global_zero:
            return 0
        if self._partial is None:
            self._file = sys.stdout
        else:
            with self._describe_errors():
                self._file, self._next = self._partial.open(identity, earlier, rows)
        return self._next

    def add(self, trainer: Trainer, records: Records) -> None:
        """Adds records. A single process writes all up to the first missing row.

        Raises:
            UnwritableError: If the file cannot be written.
            ReaderGoneError: If standard output was closed by its reader.
        """
        new = {position: record for position, record in records.items() if position >= self._next}
        is_ascii = self._partial is None and not (sys.stdout.encoding or "").lower().startswith("utf")
        for position, record in new.items():
            self._waiting[position] = printable(json.dumps(record, ensure_ascii=is_ascii))
        if trainer.world_size == 1:
            self._write(self._pop_next_lines())

    def _pop_next_lines(self) -> Iterable[str]:
        while self._next in self._waiting:
            yield self._waiting.pop(self._next)
            self._next += 1

    def _write(self, lines: Iterable[str]) -> None:
        assert self._file is not None
        with self._describe_errors():
            self._file.writelines(f"{line}\n" for line in lines)
            self._file.flush()

    def close(self, trainer: Trainer) -> None:
        """Writes the remaining lines and renames the file.

        Raises:
            UnwritableError: If the file cannot be written.
        """
        lines = gather_rows(self._waiting)
        if self._file is None:
            return
        self._write(line for _, line in sorted(lines.items()))
        if self._partial is not None:
            self._file.close()
            self._partial.finish()
            log.info("Wrote %d rows: %s", max(self._next, len(lines)), self._partial.path)
        self._file = None

    def leave(self) -> None:
        """Closes the incomplete file."""
        if self._file is not None and self._partial is not None:
            with suppress(OSError):  # the first error of the file is reported already
                self._file.close()
        self._file = None

    @contextmanager
    def _describe_errors(self) -> Iterator[None]:
        """Raises errors of writing with a message that names the file and a remedy."""
        try:
            yield
        except OSError as error:
            if self._partial is not None:
                raise UnwritableError(self._describe(error)) from error
            _forget_standard_output()
            if error.errno == errno.EPIPE:
                raise ReaderGoneError from error
            raise UnwritableError(f"standard output cannot be written: {error.strerror}") from error

    def _describe(self, error: OSError) -> str:
        assert self._partial is not None
        part = self._partial.part
        rows = count_complete_lines(part, self._rows)[0] if part.is_file() else 0
        content = f"it has rows 0 to {rows - 1}" if rows else "it has no complete row"
        remedy = "Free disk space" if error.errno in FULL else "Solve this problem"
        next_step = "run the same command again to continue from there" if self._is_resumable else "run it again"
        return f"{part} cannot be written ({error.strerror or error}): {content}. {remedy}, then {next_step}"


def _forget_standard_output() -> None:
    """Prevents the interpreter from flushing standard output when it exits."""
    with suppress(OSError):  # if standard output is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def gather_rows(rows: dict[int, T]) -> dict[int, T]:
    """Returns the rows of all processes."""
    return {row: value for part in gather_objects(rows) for row, value in part.items()}
