"""Rows in memory, each with the file, the line and the index that it comes from."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Row = Mapping[str, Any]
OnBadRow = Literal["raise", "skip"]
Parsed = Iterator[tuple[int, Row | str]]  # a number to find the row by, and the row, or what is wrong with it

LINE, INDEX = "{name}:{number}", "row {number} of {name}"  # lines count from 1, rows without lines from 0
BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """Data that cannot be read. The message names the position, the reason and a remedy."""


class NoSplitError(DataError):
    """A source that can be read, but lacks the requested split.

    Args:
        message: What is missing.
        splits: The splits of the source.
    """

    def __init__(self, message: str, splits: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.splits = splits


@dataclass(frozen=True)
class File:
    """A file of rows.

    Args:
        name: Its path or another name.
        place: How the place of a row is written, with `{name}` and `{number}`.
    """

    name: str
    place: str

    def where(self, number: int) -> str:
        """The place of a row, such as `train.jsonl:17`."""
        return self.place.format(name=self.name, number=number)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row comes from.

    Args:
        where: File and line, or file and index, for messages.
        index: The index of the row in its file, from 0; rows that were skipped count.
        file: The file, where there are several.
    """

    where: str
    index: int
    file: str | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows, each with the place it came from.

    Args:
        store: The rows.
        name: The path of the file or another name.
        place: How a place is written, with `{name}` and `{number}`.
        numbers: Each row's line or index; None if that is its index here.
        skipped: What was wrong with the rows that were left out, place included.
        indices: Each row's index in its file, with those that were left out; None if that is its index here.
        files: Each row's file, if there are several.
    """

    store: Sequence[Row]
    name: str
    place: str = INDEX
    numbers: Sequence[int] | None = None
    skipped: tuple[str, ...] = ()
    indices: Sequence[int] | None = None
    files: Sequence[File] | None = None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Row:
        return self.store[index]

    def __iter__(self) -> Iterator[Row]:
        return (self.store[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """The place of a row, such as `train.jsonl:17` or `row 16 of train.parquet`."""
        file = File(self.name, self.place) if self.files is None else self.files[index]
        return file.where(index if self.numbers is None else self.numbers[index])

    def origin(self, index: int) -> Origin:
        """Where a row comes from."""
        number = index if self.indices is None else self.indices[index]
        return Origin(self.where(index), number, None if self.files is None else self.files[index].name)

    def only(self, positions: Sequence[int]) -> Rows:
        """Some of the rows, each with its origin."""
        return self.derive([self.store[position] for position in positions], positions)

    def derive(self, store: Sequence[Row], positions: Sequence[int]) -> Rows:
        """Rows that are derived from these.

        Args:
            store: The new rows.
            positions: For each new row, the position of the row here that it is derived from.
        """
        numbers = list(positions) if self.numbers is None else [self.numbers[at] for at in positions]
        indices = list(positions) if self.indices is None else [self.indices[at] for at in positions]
        files = None if self.files is None else [self.files[at] for at in positions]
        return replace(self, store=store, numbers=numbers, indices=indices, files=files)

    def rename_columns(self, names: Mapping[str, str]) -> Rows:
        """The same rows with other names for some columns."""
        return replace(self, store=RenamedRows(self.store, names)) if names else self


@dataclass(frozen=True, eq=False)
class RenamedRows(Sequence[Row]):
    """Rows under other names for some columns, which replace columns that have these names.

    Args:
        store: The rows.
        names: The new name of each column that gets one.
    """

    store: Sequence[Row]
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        row = self.store[index]
        others = {name: row[name] for name in row if name not in self.names}
        return {**others, **{new: row[old] for old, new in self.names.items() if old in row}}


def join(parts: Sequence[Rows], name: str) -> Rows:
    """The rows of several files, one file after the other."""
    if len(parts) == 1:
        return parts[0]
    files = [file for part in parts for file in [File(part.name, part.place)] * len(part)]
    return Rows(
        [row for part in parts for row in part],
        name,
        numbers=[number for part in parts for number in _numbers(part.numbers, len(part))],
        skipped=tuple(reason for part in parts for reason in part.skipped),
        indices=[index for part in parts for index in _numbers(part.indices, len(part))],
        files=files,
    )


def _numbers(given: Sequence[int] | None, length: int) -> Sequence[int]:
    return range(length) if given is None else given


def collect(parsed: Parsed, name: str, place: str, on_bad_row: OnBadRow) -> Rows:
    """The rows that a parser finds.

    Raises:
        DataError: If there is no row, or one is bad and may not be skipped.
    """
    rows: list[Row] = []
    numbers, indices, skipped = array("q"), array("q"), []
    for index, (number, row) in enumerate(parsed):
        if not isinstance(row, str):
            rows.append(row)
            numbers.append(number)
            indices.append(index)
            continue
        skipped.append(f"{place.format(name=name, number=number)}: {row}")
        if on_bad_row == "raise":
            raise DataError(f"{skipped[0]}. Fix the row, or leave such rows out with on_bad_row='skip'")
    if rows:
        return Rows(rows, name, place, numbers, tuple(skipped), indices)
    if skipped:
        raise DataError(f"{name} has no row that can be read; the first of {len(skipped)}: {skipped[0]}")
    raise DataError(f"{name} has no rows; check that it was written to the end")


def check(rows: Iterable[object], may_hold_surrogates: bool = False) -> Parsed:
    """Rows that were read as a whole, numbered from 0."""
    for index, row in enumerate(rows):
        if isinstance(row, Mapping):
            yield index, (half_surrogate(row) if may_hold_surrogates else None) or row
        else:
            yield index, f"expected columns and their values, got {short(row)}"


def half_surrogate(row: object) -> str | None:
    """What is wrong with a row that holds half a surrogate pair, which would break tokenizers much later."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return not_utf8(error)
    return None


def first_columns(row: Mapping[Any, Any] | Sequence[str], most: int = 20) -> str:
    """The names of a row's columns, for messages.

    >>> first_columns({"b": 1, "a": 2}), first_columns({"b": 1, "a": 2}, most=1)
    ("['a', 'b']", "['a'] and 1 more")
    """
    names = sorted(map(str, row))
    return f"{names[:most]}{f' and {len(names) - most} more' if len(names) > most else ''}"


def short(value: object) -> str:
    """Type and beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def not_utf8(error: UnicodeError) -> str:
    """What to do about text in another encoding."""
    return f"not UTF-8 ({error}); save the file as UTF-8"
