"""Reads the text of corpora in pieces of bounded length, so that memory does not depend on the size of a corpus."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lightning_softprompt.data.corpus.documents import TEXT, find_document_files, read_documents
from lightning_softprompt.data.readers.content_kind import HEAD, refuse_other_content
from lightning_softprompt.data.readers.files import TEXT_SUFFIXES, data_suffix, open_file
from lightning_softprompt.data.readers.json_rows import parse_json_lines
from lightning_softprompt.data.readers.rows import BOM, DataError, not_utf8
from lightning_softprompt.data.readers.text_files import read_text_file

SIZE = 1 << 16  # maximum characters of a piece
MAX_ROWS = 2_000_000  # texts of rows that are compared with later ones
JSON_LINES = (".jsonl", ".ndjson")
SPACE_BEFORE = re.compile(r"\s+\S*\Z")


class Piece(NamedTuple):
    """A part of a document.

    Args:
        document: Number of the document in the corpus, from 0.
        text: The text, at most `SIZE` characters.
    """

    document: int
    text: str


def read_pieces(sources: Iterable[str], columns: Sequence[str] = (TEXT,), split: str | None = None) -> Iterator[Piece]:
    """Yields the text of corpora, document by document.

    Text files and JSON lines are read line by line. A line of JSON is in memory as a whole, a line of text is not. A
    text that several rows contain, such as a passage with several questions, is read once.

    Args:
        sources: Files, folders, patterns or hub data sets, as `CorpusDataModule` reads them.
        columns: Names of the column of the text in rows; the first one that a row has is read.
        split: The split of a folder or hub data set.

    Raises:
        DataError: If a source has no text, is not UTF-8, or has no such column.
    """
    document = -1
    seen: set[bytes] = set()
    for source in sources:
        previous, has_text = None, False
        for number, text in _read_source(source, columns, split):
            has_text = has_text or not text.isspace()
            if isinstance(number, int) and _is_repeated(text, seen):
                continue
            if number != previous:
                previous, document = number, document + 1
            for part in split_text(text):
                yield Piece(document, part)
        if not has_text:
            raise DataError(f"{source} has no text; check that the file was written to the end")


def _is_repeated(text: str, seen: set[bytes]) -> bool:
    """Whether a row has the text of an earlier one, of the first `MAX_ROWS` different ones; adds it to these."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    if digest in seen:
        return True
    if len(seen) < MAX_ROWS:
        seen.add(digest)
    return False


def split_text(text: str, size: int = SIZE) -> Iterator[str]:
    """Yields parts of a text that join to it, divided before white space where possible.

    >>> list(split_text("one two three", 9))
    ['one two', ' three']
    """
    start = 0
    while len(text) - start > size:
        part = text[start : start + size]
        space = SPACE_BEFORE.search(part)
        length = space.start() if space is not None and space.start() else size
        yield text[start : start + length]
        start += length
    if start < len(text):
        yield text[start:]


def _read_source(source: str, columns: Sequence[str], split: str | None) -> Iterator[tuple[Any, str]]:
    """Yields texts with a key, which is the same for all texts of a document; it is an integer for rows."""
    paths = find_document_files(source, split)
    path = Path(source).expanduser()
    if paths is not None:
        for file in paths:
            if data_suffix(file) in TEXT_SUFFIXES:
                yield from (((file, number), text) for number, text in _read_text(file))
            else:
                yield file, read_text_file(file)[1]
    elif path.is_file() and data_suffix(path) in JSON_LINES:
        yield from _read_json_lines(path, columns)
    else:
        rows = read_documents(source, split, columns=columns)
        for index, row in enumerate(rows):
            yield index, _text_of(row, columns, rows.where(index))


def _read_json_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    with open_file(path) as file:
        for number, row in parse_json_lines(file):
            place = f"{path}:{number}"
            if isinstance(row, str):
                raise DataError(f"{place}: {row}. Fix the row")
            yield number, _text_of(row, columns, place)


def _text_of(row: Any, columns: Sequence[str], place: str) -> str:
    for column in columns:
        if isinstance(row.get(column), str):
            return str(row[column])
    names = " or ".join(map(repr, columns))
    raise DataError(f"{place} has no text in the column {names}; its columns are {sorted(row)}. Set --column")


def _read_text(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file with the number of their document. A blank line ends a document."""
    with open_file(path) as file:
        refuse_other_content(file.read(HEAD), str(path))
        file.seek(0)
        document, has_lines = 0, False
        for text in _decode_lines(file, path):
            if text.isspace():
                document, has_lines = document + has_lines, False
            else:
                has_lines = True
                yield document, text


def _decode_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yields lines, and parts of lines that are longer than `SIZE` bytes."""
    decoder = getincrementaldecoder("utf-8")()
    is_first = True
    while True:
        content = file.readline(SIZE)
        content, is_first = content.removeprefix(BOM) if is_first else content, False
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {not_utf8(error)}") from error
        if text:
            yield text
        if not content:
            return
