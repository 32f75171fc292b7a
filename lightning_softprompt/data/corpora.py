"""Where the documents of a corpus come from: rows of a table, or files of text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_softprompt.data.sources import READERS, DataError, OnBadRow, Row, Rows, read_rows
from lightning_softprompt.data.text_files import TEXT_FILES, find_text_files, read_text_file
from lightning_softprompt.retrieval.documents import Document

log = logging.getLogger(__name__)
CORPUS = "corpus"  # the split of this name, where a folder has several


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Args:
        text: The text; every row must have one.
        id: What a document is named by; where there is no such column, its number from 0.
        title: Its heading; not wanted.
        source: Where it comes from; where there is no such column, file and line.
    """

    text: str = "text"
    id: str = "id"
    title: str = "title"
    source: str = "source"


def read_documents(
    source: str | Path, columns: Columns | None = None, split: str | None = None, on_bad_row: OnBadRow = "raise"
) -> Iterator[Document]:
    """The documents of a corpus, in turn.

    Args:
        source: JSON lines, CSV, TSV, Parquet, a folder with one of them or saved by `datasets`, a hub data set, `-`; or
            a file of text, Markdown, HTML or PDF, or a folder of such.
        columns: Which columns hold what; files of text need none.
        split: Which split of a folder or hub data set; `corpus` unless given, where there is one.
        on_bad_row: Whether a row or file that cannot be read is an error, or is skipped with a warning.

    Raises:
        DataError: If there is nothing to read, or a row or file cannot be read and may not be skipped.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in TEXT_FILES and path.is_file():
        yield from _from_files([path], path.parent, on_bad_row)
    elif path.is_dir() and not _has_rows(path):
        yield from _from_files(find_text_files(path), path, on_bad_row)
    else:
        chosen = CORPUS if split is None and path.is_dir() and any(path.glob(f"{CORPUS}.*")) else split
        yield from _from_rows(read_rows(source, chosen, on_bad_row), columns or Columns(), on_bad_row)


def _has_rows(folder: Path) -> bool:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return True
    return any(path.suffix.lower() in READERS for path in folder.iterdir())


def _from_files(paths: list[Path], root: Path, on_bad_row: OnBadRow) -> Iterator[Document]:
    for path in paths:
        try:
            title, text = read_text_file(path)
        except DataError as error:
            _bad(str(error), on_bad_row, "Mend or move the file, or leave such files out with on_bad_row='skip'")
            continue
        yield Document(path.relative_to(root).as_posix(), title, text, str(path))


def _from_rows(rows: Rows, columns: Columns, on_bad_row: OnBadRow) -> Iterator[Document]:
    for told in rows.skipped:
        log.warning("left out: %s", told)
    for index in range(len(rows)):
        found = _document(rows[index], rows.where(index), index, columns)
        if isinstance(found, str):
            _bad(
                f"{rows.where(index)}: {found}",
                on_bad_row,
                "Name the columns, mend the row, or leave such rows out with on_bad_row='skip'",
            )
        else:
            yield found


def _document(row: Row, place: str, index: int, columns: Columns) -> Document | str:
    """The document of a row, or what is wrong with it."""
    text = row.get(columns.text)
    if not isinstance(text, str):
        return f"no text in column {columns.text!r}, got {type(text).__name__}; it has {sorted(row)}"
    if not text.strip():
        return f"the text in column {columns.text!r} is empty"
    id = _said(row, columns.id, str(index))
    return Document(id, _said(row, columns.title, ""), text, _said(row, columns.source, place))


def _said(row: Row, column: str, otherwise: str) -> str:
    value = row.get(column)
    return otherwise if value is None else str(value)


def _bad(told: str, on_bad_row: OnBadRow, way_out: str) -> None:
    if on_bad_row == "raise":
        raise DataError(f"{told}. {way_out}")
    log.warning("left out: %s", told)
