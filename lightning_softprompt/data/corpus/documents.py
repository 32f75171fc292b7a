"""Reads the documents of a corpus: text files, folders of them, and every source of rows with a column of text."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lightning_softprompt.data.readers.content_kind import HEAD, refuse_other_content
from lightning_softprompt.data.readers.files import TEXT_SUFFIXES, data_suffix, open_file
from lightning_softprompt.data.readers.folders import SPLITS, find_split, has_rows
from lightning_softprompt.data.readers.rows import (
    BOM,
    LINE,
    DataError,
    File,
    NoSplitError,
    OnBadRow,
    Parsed,
    Row,
    Rows,
    collect,
    first_columns,
    join,
    not_utf8,
)
from lightning_softprompt.data.readers.sources import is_pattern, read_rows
from lightning_softprompt.data.readers.text_files import TEXT_FILES, find_text_files, has_text_files, read_text_file

log = logging.getLogger(__name__)
Boundary = Literal["auto", "blank_line", "line", "file"]
TEXT = "text"
WHOLE_FILE = "{name}"  # the position of a document that is a file
SAVED = ("dataset_dict.json", "state.json")  # files of a data set that `datasets` saved


def read_documents(
    source: str | Path | Sequence[Row] | Sequence[str],
    split: str | None = None,
    on_bad_row: OnBadRow = "raise",
    columns: Collection[str] = (TEXT,),
    boundary: Boundary = "auto",
) -> Rows:
    """Reads the documents of a split as rows.

    Args:
        source: A text file, a pattern or list of files, a folder of text files, or a source of rows as in `read_rows`.
        split: The split of a folder or hub data set.
        on_bad_row: Whether a document that cannot be read is an error, or is skipped.
        columns: The column of the text.
        boundary: What ends a document of a text file; `auto` is a blank line, and the end of the file in a folder.

    Raises:
        DataError: If there is nothing to read, or a document cannot be read and may not be skipped.
    """
    paths = find_document_files(source, split)
    if paths is None:
        return read_rows(source, split, on_bad_row, columns)
    files = open_documents(source, paths, next(iter(columns)), boundary)
    parts = [collect(parsed, file.name, file.place, on_bad_row) for file, parsed in files]
    name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files from {paths[0]}"
    return join(parts, name)


def find_document_files(source: Any, split: str | None) -> list[Path] | None:
    """Returns the text files of a split; None if the source consists of rows.

    Raises:
        NoSplitError: If a folder has text files of splits, but none of this split.
        DataError: If a pattern or list mixes text files with other files.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return None if _has_tables(path) else _files_of_split(path, split)
        if is_pattern(str(source)):
            matches = map(Path, sorted(glob(str(path), recursive=True)))
            return _only_texts([match for match in matches if match.is_file()])
        return [path] if path.is_file() and _is_text(path) else None
    if isinstance(source, Sequence) and source and all(isinstance(file, str | Path) for file in source):
        return _only_texts([Path(file).expanduser() for file in source])
    return None


def resolve_boundary(source: Any, boundary: Boundary) -> Boundary:
    """Returns what ends a document of a source of text files."""
    if boundary != "auto":
        return boundary
    is_folder = isinstance(source, str | Path) and Path(source).expanduser().is_dir()
    return "file" if is_folder else "blank_line"


def is_folder_of_texts(path: str) -> bool:
    """Whether a path is a folder of text files that are not named as splits."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or _has_tables(folder):
        return False
    return not _splits_of(folder, find_text_files(folder))


def open_documents(
    source: Any, paths: Sequence[Path], column: str, boundary: Boundary
) -> Iterator[tuple[File, Parsed]]:
    """Yields each text file of a source with its documents, which are read while they are used.

    Raises:
        DataError: If a file is not text.
    """
    rule = resolve_boundary(source, boundary)
    place = WHOLE_FILE if rule == "file" else LINE
    for path in paths:
        name = str(path)
        if data_suffix(path) not in TEXT_SUFFIXES:  # Markdown, HTML and PDF have their readers
            yield File(name, WHOLE_FILE), iter([(1, _read_whole(path, column))])
            continue
        with open_file(path) as file:
            refuse_other_content(file.read(HEAD), name)
            file.seek(0)
            yield File(name, place), parse_documents(file, column, rule)


def read_text(row: Row, column: str) -> str:
    """Returns the text of a document, without white space at its start and end.

    Raises:
        ValueError: If the row has no text.
    """
    if column not in row:
        raise ValueError(f"no column {column!r}; the row has {first_columns(row)}: set data.column")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"column {column!r} must be text, got {text!r} ({type(text).__name__})")
    return text.strip()


def _read_whole(path: Path, column: str) -> Row | str:
    try:
        return {column: read_text_file(path)[1]}
    except DataError as error:
        return str(error)


def parse_documents(file: BinaryIO, column: str, boundary: Boundary) -> Parsed:
    """Yields the documents of a text file, each with the number of its first line.

    Args:
        file: The file. It is read line by line.
        column: Name of the column of the text.
        boundary: What ends a document.
    """
    first = 1
    lines: list[bytes] = []
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        is_blank = not content.strip()
        ends = boundary == "line" or (boundary == "blank_line" and is_blank)
        if not lines:
            first = number
        if not is_blank or not ends:
            lines.append(content)
        if ends and lines:
            yield first, _decode(lines, column)
            lines = []
    if any(line.strip() for line in lines):
        yield first, _decode(lines, column)


def _decode(lines: Iterable[bytes], column: str) -> Row | str:
    try:
        text = b"".join(lines).decode()
    except UnicodeDecodeError as error:
        return not_utf8(error)
    return {column: text.replace("\r\n", "\n")}


def _is_text(path: Path) -> bool:
    return data_suffix(path) in TEXT_FILES


def _only_texts(paths: Sequence[Path]) -> list[Path] | None:
    texts = [path for path in paths if _is_text(path)]
    if texts and len(texts) < len(paths):
        other = next(path for path in paths if not _is_text(path))
        raise DataError(f"{texts[0]} is a text file and {other} is not; name files of one kind")
    return texts or None


def _has_tables(folder: Path) -> bool:
    if any((folder / name).exists() for name in SAVED):
        return True
    return has_rows(folder) or not has_text_files(folder)


def _splits_of(folder: Path, paths: Iterable[Path]) -> dict[str, list[Path]]:
    """The text files of each split, if files or folders are named as splits."""
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        parts = path.relative_to(folder).parts
        name = parts[0] if len(parts) > 1 else path.stem
        if name.casefold() in SPLITS:
            by_split.setdefault(name, []).append(path)
    return by_split


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    paths = find_text_files(folder)
    by_split = _splits_of(folder, paths)
    if not by_split:
        return paths
    name = find_split(by_split, split)
    if name is None:
        raise NoSplitError(f"{folder} has text files of the splits {sorted(by_split)}, expected {split!r}", [*by_split])
    return by_split[name]
