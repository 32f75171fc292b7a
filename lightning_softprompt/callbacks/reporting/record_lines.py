"""Records of rows as JSON lines, in the order of the data, in a file or on standard output."""

from __future__ import annotations

import errno
import json
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

Records = Mapping[int, Mapping[str, Any]]  # by their position in the order of the data
T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)


class UnwritableError(OSError):
    """Lines that cannot be written; the message says where, how far it got, and how to go on."""


class ReaderGoneError(BrokenPipeError):
    """Whoever read standard output, such as `head`, has seen enough."""


class RecordLines:
    """JSON lines, ordered by row, that the first process writes for all.

    Args:
        path: The file, which bears the suffix `.part` until it is whole; or `-` for standard output.
    """

    def __init__(self, path: Path | Literal["-"]) -> None:
        self._unfinished = None if path == "-" else PartialFile(Path(path))
        self._file: TextIO | None = None
        self._waiting: dict[int, str] = {}  # rows that came before an earlier one did
        self._next = 0
        self._goes_on = False  # whether a run like this one would go on with what stays behind
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
        self._waiting, self._next, self._goes_on, self._rows = {}, 0, identity is not None, rows
        if not trainer.is_global_zero:
            return 0
        if self._unfinished is None:
            self._file = sys.stdout
        else:
            with self._telling():
                self._file, self._next = self._unfinished.open(identity, earlier, rows)
        return self._next

    def add(self, trainer: Trainer, records: Records) -> None:
        """Takes records; one process writes those that are in turn at once.

        Raises:
            UnwritableError: If the file cannot be written.
            ReaderGoneError: If nobody reads standard output any more.
        """
        wanted = {position: record for position, record in records.items() if position >= self._next}
        is_ascii = self._unfinished is None and not (sys.stdout.encoding or "").lower().startswith("utf")
        for position, record in wanted.items():
            self._waiting[position] = printable(json.dumps(record, ensure_ascii=is_ascii))
        if trainer.world_size == 1:
            self._write(self._in_turn())

    def _in_turn(self) -> Iterable[str]:
        while self._next in self._waiting:
            yield self._waiting.pop(self._next)
            self._next += 1

    def _write(self, lines: Iterable[str]) -> None:
        assert self._file is not None
        with self._telling():
            self._file.writelines(f"{line}\n" for line in lines)
            self._file.flush()

    def close(self, trainer: Trainer) -> None:
        """Writes what is left and gives the file its name.

        Raises:
            UnwritableError: If the file cannot be written.
        """
        lines = of_all_processes(self._waiting)
        if self._file is None:
            return
        self._write(line for _, line in sorted(lines.items()))
        if self._unfinished is not None:
            self._file.close()
            self._unfinished.finish()
        self._file = None

    def leave(self) -> None:
        """Leaves the file as it is."""
        if self._file is not None and self._unfinished is not None:
            with suppress(OSError):  # what could not be written is told of already
                self._file.close()
        self._file = None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tells of what cannot be written so that a user can mend it."""
        try:
            yield
        except OSError as error:
            if self._unfinished is not None:
                raise UnwritableError(self._told(error)) from error
            _forget_standard_output()
            if error.errno == errno.EPIPE:
                raise ReaderGoneError from error
            raise UnwritableError(f"standard output cannot be written: {error.strerror}") from error

    def _told(self, error: OSError) -> str:
        assert self._unfinished is not None
        part = self._unfinished.part
        rows = count_complete_lines(part, self._rows)[0] if part.is_file() else 0
        held = f"rows 0 to {rows - 1} are whole in it" if rows else "it holds no whole line"
        remedy = "Free some space" if error.errno in FULL else "Mend that"
        again = "give the same command again, which goes on from there" if self._goes_on else "run it again"
        return f"{part} cannot be written ({error.strerror or error}): {held}. {remedy}, then {again}"


def _forget_standard_output() -> None:
    """Keeps the interpreter from a last attempt to write, when it exits."""
    with suppress(OSError):  # standard output that is no file has no such attempt
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def of_all_processes(rows: dict[int, T]) -> dict[int, T]:
    """Returns the rows of all processes."""
    return {row: value for part in gather_objects(rows) for row, value in part.items()}
