"""Files of rows by the ends of their names, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import zlib
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from lightning_softprompt.data.readers.content_kind import HEAD, refuse_other_content
from lightning_softprompt.data.readers.csv_rows import parse_table, parse_tsv
from lightning_softprompt.data.readers.json_rows import parse_json, parse_json_lines
from lightning_softprompt.data.readers.rows import INDEX, LINE, DataError, OnBadRow, Parsed, Rows, check, collect
from lightning_softprompt.data.readers.text_rows import parse_text

OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
PARQUET = ".parquet"
TEXT_SUFFIXES = (".txt", ".text")
SPARE, CELLS, MOST = 2 * 2**20, 10**5, 100  # a file may hold so many bytes and cells, or MOST times its own bytes
CHUNK = 1 << 18  # bytes
BATCH = 256  # rows of Parquet that are decoded at once: a small file may repeat a long text in each of them


def read_file(path: Path, on_bad_row: OnBadRow, columns: Collection[str] = ()) -> Rows:
    """All rows of a file.

    Args:
        path: The file.
        on_bad_row: Whether a bad row is an error, or is skipped.
        columns: The columns that are needed; plain text becomes the only one of them.

    Raises:
        DataError: If it is of no known kind or cannot be read, or a row is bad and may not be skipped.
    """
    suffix = data_suffix(path)
    try:
        if suffix in TEXT_SUFFIXES or (suffix in READERS and suffix != PARQUET):
            refuse_other_content(_head(path), str(path))
        if suffix in TEXT_SUFFIXES:
            with open_file(path) as file:
                parsed, place = parse_text(file.read(), str(path), columns)
            return collect(parsed, str(path), place, on_bad_row)
        if suffix not in READERS:
            kinds = ", ".join([*READERS, *TEXT_SUFFIXES[:1]])
            raise DataError(f"{path} is of no known kind; expected one of {kinds}. Convert or rename it")
        return READERS[suffix](path, on_bad_row)
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or path.suffix.lower() not in OPENERS):
            raise  # such as a file that may not be read
        raise DataError(f"{path} is a broken {path.suffix} file: {error}. Write it again") from error


def data_suffix(path: Path) -> str:
    """Returns the suffix of a file that determines its format, without the suffix of a compression.

    >>> data_suffix(Path("train.JSONL.gz")), data_suffix(Path("train.csv"))
    ('.jsonl', '.csv')
    """
    return Path(path.stem if path.suffix.lower() in OPENERS else path.name).suffix.lower()


def data_stem(path: Path) -> str:
    """The name of a file without these ends.

    >>> data_stem(Path("train.jsonl.gz")), data_stem(Path("train.csv"))
    ('train', 'train')
    """
    return Path(path.stem if path.suffix.lower() in OPENERS else path.name).stem


def open_file(path: Path) -> BinaryIO:
    """A file's bytes, decompressed.

    Raises:
        DataError: If a small file expands to very many.
    """
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        return path.open("rb")
    _check_expansion(path)
    return cast(BinaryIO, opener(path))


def _head(path: Path) -> bytes:
    opener = OPENERS.get(path.suffix.lower(), partial(open, mode="rb"))
    with opener(path) as file:
        return cast(bytes, file.read(HEAD))


def _check_expansion(path: Path) -> None:
    """Refuses a compressed file that expands far beyond its size, before its content is stored.

    Raises:
        DataError: If it does.
    """
    left = _most(path, SPARE)
    with OPENERS[path.suffix.lower()](path) as content:
        while part := content.read(CHUNK):
            left -= len(part)
            if left < 0:
                raise _too_large(path, SPARE, "bytes")


def _most(path: Path, usual: int) -> int:
    return max(usual, MOST * path.stat().st_size)


def _too_large(path: Path, usual: int, unit: str) -> DataError:
    return DataError(
        f"{path} has {path.stat().st_size:,} bytes and expands to more than {_most(path, usual):,} {unit}, as a file "
        f"does that is made to exhaust memory. If it is yours, write its rows as JSON lines that are not compressed"
    )


def _read_lines(path: Path, on_bad_row: OnBadRow, parse: Callable[[BinaryIO, str], Parsed]) -> Rows:
    with open_file(path) as file:
        return collect(parse(file, str(path)), str(path), LINE, on_bad_row)


def _read_json(path: Path, on_bad_row: OnBadRow) -> Rows:
    with open_file(path) as file:
        parsed, place = parse_json(file.read(), str(path))
    return collect(parsed, str(path), place, on_bad_row)


def _read_parquet(path: Path, on_bad_row: OnBadRow) -> Rows:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            rows = _parquet_rows(table, path)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no Parquet file, or a broken one: {error}. Write it again") from error
    return collect(check(rows), str(path), INDEX, on_bad_row)


def _parquet_rows(table: Any, path: Path) -> list[Any]:
    if table.metadata.num_rows * max(1, table.metadata.num_columns) > _most(path, CELLS):
        raise _too_large(path, CELLS, "cells")
    left = _most(path, SPARE)
    rows: list[Any] = []
    for batch in table.iter_batches(batch_size=BATCH):
        left -= batch.nbytes
        if left < 0:
            raise _too_large(path, SPARE, "bytes")
        rows += batch.to_pylist()
    return rows


def _json_lines(file: BinaryIO, name: str) -> Parsed:
    return parse_json_lines(file)


_read_json_lines = partial(_read_lines, parse=_json_lines)
READERS: dict[str, Callable[[Path, OnBadRow], Rows]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": partial(_read_lines, parse=partial(parse_table, delimiter=",", quoting=csv.QUOTE_MINIMAL)),
    ".tsv": partial(_read_lines, parse=parse_tsv),
    PARQUET: _read_parquet,
}
