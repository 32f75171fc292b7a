"""Rows of CSV and TSV. After a stray quotation mark, reading continues at the next line."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal

from lightning_softprompt.data.readers.rows import BOM, DataError, Parsed, Row, first_columns, not_utf8

log = logging.getLogger(__name__)
Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
LIKE_ROWS = 3  # so many lines within a cell that look like rows are worth a warning
QUOTED = re.compile(r'(?:^|(?<=\t))"((?:[^"]++|"")*+)"(?=\t|\r?$)', re.MULTILINE)
TAB = "\t"
NAME = r'"?[^\W\d]\w*"?'
OTHER_DELIMITER = re.compile(rf"{NAME}(?P<delimiter>[,;|\t]){NAME}(?:(?P=delimiter){NAME})*")
OPENED = re.compile(r'(?:^|\t)"', re.MULTILINE)


def parse_table(file: Iterable[bytes], name: str, delimiter: str, quoting: Quoting = csv.QUOTE_MINIMAL) -> Parsed:
    """The rows of a table whose first line names the columns.

    Args:
        file: Its lines.
        name: The file's name, for messages.
        delimiter: What separates cells.
        quoting: Whether cells may be quoted.

    Raises:
        DataError: If the first line does not name the columns.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than many a document
    table = _Table(file, delimiter, quoting)
    header: list[str] | None = None
    for record in table.records():
        if header is None:
            header = _header(record, name, delimiter)
        elif record.cells or record.problem:
            _warn_of_swallowed_rows(table, record, len(header), name)
            yield record.line, record.problem or _row(header, record.cells)


class _Record:
    """One row of a table as text.

    Args:
        line: Its first line, from 1.
        lines: Its text.
        cells: Its cells; none if it cannot be split into cells.
        problem: What is wrong with it.
    """

    def __init__(self, line: int, lines: Sequence[str], cells: list[str], problem: str | None) -> None:
        self.line, self.lines, self.cells, self.problem = line, lines, cells, problem


class _Table:
    """Splits lines into records.

    A quoted cell that is not closed properly runs on to the next quotation mark, or to the end of the file. Its first
    line is then a bad row. The lines that it ran over are read one by one, and reading continues as usual at the line
    where the error was found. So each line is read at most twice.
    """

    def __init__(self, file: Iterable[bytes], delimiter: str, quoting: Quoting) -> None:
        self._not_utf8: dict[int, str] = {}
        self._lines = self._decode(file)
        self._waiting: deque[str] = deque()
        self._taken: list[str] = []  # the lines of the current record
        self._next_line = 1
        self._delimiter = delimiter
        cell = rf'(?:"(?:[^"]++|"")*+"|[^"{delimiter}]*+)'
        self._regular = re.compile(f"{cell}(?:{delimiter}{cell})*+")  # no mark within a cell that is not quoted
        self._dialect = {"delimiter": delimiter, "quoting": quoting, "strict": True}
        self._reader = csv.reader(self._take(), **self._dialect)  # type: ignore[arg-type]

    def records(self) -> Iterator[_Record]:
        """All records, bad ones too."""
        while True:
            self._taken = []
            line = self._next_line
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield from self._recover(line, str(error))
                continue
            yield self._record(line, self._taken, cells)

    def split(self, line: str) -> list[str] | None:
        """The cells of a line that is a record by itself, or None if it is not."""
        try:
            return next(csv.reader([line], **self._dialect), [])  # type: ignore[arg-type]
        except csv.Error:
            return None

    def _recover(self, line: int, reason: str) -> Iterator[_Record]:
        taken = self._taken
        last = line + len(taken) - 1
        reaches = "" if last == line else f"; the cell runs on to line {last}, so reading continues at line {line + 1}"
        yield _Record(line, taken[:1], [], f"broken quoting: {reason}{reaches}")
        at_end = reason == "unexpected end of data"
        begins = last > line and not at_end and not self._ends_a_cell(taken[-1])
        for number, text in enumerate(taken[1:-1] if begins else taken[1:], start=line + 1):
            yield self._alone(number, text)
        if begins:
            self._waiting.append(taken[-1])
            self._next_line = last
        self._reader = csv.reader(self._take(), **self._dialect)  # type: ignore[arg-type]

    def _ends_a_cell(self, line: str) -> bool:
        """Whether the first quotation mark of a line closes a cell of lines before it, instead of opening one."""
        before = line.partition('"')[0]
        return line.count('"') % 2 == 1 and not (before == "" or before.endswith(self._delimiter))

    def _alone(self, line: int, text: str) -> _Record:
        cells = self.split(text)
        if cells is None or not self._regular.fullmatch(text.rstrip("\r\n")):
            return _Record(line, [text], [], "broken quoting: it follows a quotation mark that is not closed")
        return self._record(line, [text], cells)

    def _record(self, line: int, lines: Sequence[str], cells: list[str]) -> _Record:
        numbers = range(line, line + len(lines))
        problem = next((self._not_utf8[number] for number in numbers if number in self._not_utf8), None)
        return _Record(line, lines, cells, problem)

    def _take(self) -> Iterator[str]:
        while True:
            line = self._waiting.popleft() if self._waiting else next(self._lines, None)
            if line is None:
                return
            self._taken.append(line)
            self._next_line += 1
            yield line

    def _decode(self, file: Iterable[bytes]) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(BOM) if number == 1 else line
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                self._not_utf8[number] = not_utf8(error)
                yield content.decode(errors="replace")


def _header(record: _Record, name: str, delimiter: str) -> list[str]:
    twice = sorted(column for column, count in Counter(record.cells).items() if count > 1)
    problem = f"the columns {first_columns(twice)} are named more than once" if twice else record.problem
    if problem or not record.cells:
        raise DataError(
            f"{name}:{record.line}: {problem or 'the names of the columns are missing'}. Fix the first line"
        )
    if len(record.cells) == 1 and (other := OTHER_DELIMITER.fullmatch(record.cells[0])):
        raise DataError(
            f"{name}:{record.line}: one column was found, {record.cells[0]!r}: cells are separated by {delimiter!r} "
            f"here, and this file seems to use {other['delimiter']!r}. Save it with {delimiter!r}"
            f"{', or as .tsv' if other['delimiter'] == TAB else ''}"
        )
    return record.cells


def _row(header: list[str], cells: list[str]) -> Row | str:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return f"expected {len(header)} cells, one for each of {first_columns(header)}, got {len(cells)}"


def _warn_of_swallowed_rows(table: _Table, record: _Record, columns: int, name: str) -> None:
    """Warns of a cell over lines that look like rows of their own: a quotation mark may have been left open."""
    within = record.lines[1:-1]
    if columns < 2 or len(within) < LIKE_ROWS:
        return
    if all(len(table.split(line) or []) == columns for line in within):
        log.warning(
            "%s:%d: one row takes lines %d to %d, and the lines in it look like rows themselves; if they are, close "
            "the quotation mark in line %d",
            name, record.line, record.line, record.line + len(record.lines) - 1, record.line,
        )  # fmt: skip


def quoting_of_tsv(lines: Sequence[bytes]) -> Quoting:
    """Whether cells of a TSV are quoted, as spreadsheets and pandas write them.

    TSV does not quote by its definition, and in GLUE cells begin with quotation marks that are never closed. So a file
    is quoted only if each cell that begins with a mark is closed properly, and either the names of all columns are
    quoted, or each quoted cell has a reason to be: a doubled mark, a tab or a line break in it.
    """
    if not any(b'"' in line for line in lines):
        return csv.QUOTE_NONE
    text = b"".join(lines).decode(errors="replace")
    cells = QUOTED.findall(text)
    is_closed = not OPENED.search(QUOTED.sub("", text))
    has_reason = all('""' in cell or "\t" in cell or "\n" in cell for cell in cells)
    names = text.lstrip("\ufeff").partition("\n")[0].split("\t")
    has_quoted_names = all(QUOTED.fullmatch(name.strip("\r")) for name in names)
    return csv.QUOTE_MINIMAL if cells and is_closed and (has_reason or has_quoted_names) else csv.QUOTE_NONE


def parse_tsv(file: Iterable[bytes], name: str) -> Parsed:
    """The rows of a TSV file."""
    lines = list(file)
    quoting = quoting_of_tsv(lines)
    if quoting == csv.QUOTE_MINIMAL:
        log.info("%s: quotation marks around cells are taken off, since all of them follow the rules of CSV", name)
    return parse_table(chain(lines), name, "\t", quoting)
