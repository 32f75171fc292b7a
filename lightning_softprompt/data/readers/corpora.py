"""Where the documents of a corpus come from: rows of a table, or files of text."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_softprompt.data.readers.files import data_suffix
from lightning_softprompt.data.readers.folders import has_rows
from lightning_softprompt.data.readers.sources import READERS, DataError, OnBadRow, Row, Rows, read_rows
from lightning_softprompt.data.readers.text_files import (
    ABOUT_A_FOLDER,
    TEXT_FILES,
    find_text_files,
    has_text_files,
    is_hidden,
    read_text_file,
)
from lightning_softprompt.retrieval.passages.documents import Document

log = logging.getLogger(__name__)
LIKE_IDS = frozenset((  # without what separates their words
    "id", "docid", "documentid", "docno", "corpusid", "pid", "passageid", "psgid", "uid", "uuid", "guid", "corduid",
    "pmid", "articleid", "pageid", "wikiid", "chunkid", "contextid", "paragraphid", "sectionid", "identifier",
))  # fmt: skip
CORPUS = "corpus"  # the split of this name, where a folder has several


@dataclass(frozen=True)
class Columns:
    """The columns of a table of documents.

    Args:
        text: The text; every row must have one.
        id: The id of a document. Without this column and columns that look like ids, documents are numbered from 0; an
            empty name always numbers them.
        title: Its heading, which is optional.
        source: Where the document comes from (default: file and line).
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
        DataError: If there is nothing to read, a row or file cannot be read and may not be skipped, or a folder holds
            both tables and files of text.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in TEXT_FILES and path.is_file():
        yield from _from_files([path], path.parent, on_bad_row)
    elif path.is_dir() and not _has_rows(path):
        paths = find_text_files(path)
        _report_left_out(path, paths)
        yield from _from_files(paths, path, on_bad_row)
    else:
        chosen = CORPUS if split is None and path.is_dir() and any(path.glob(f"{CORPUS}.*")) else split
        if path.is_dir() and split is None:
            _check_texts_beside_tables(path, chosen)
        yield from _from_rows(read_rows(source, chosen, on_bad_row), columns or Columns(), on_bad_row)


def _has_rows(folder: Path) -> bool:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return True
    if any(data_suffix(path) in READERS for path in folder.iterdir()):
        return True
    return has_rows(folder) and not has_text_files(folder)


def _check_texts_beside_tables(folder: Path, chosen: str | None) -> None:
    """Raises an error if a folder holds tables and files of text, unless a table has the name of a corpus."""
    tables = sorted(path.name for path in folder.iterdir() if data_suffix(path) in READERS)
    files = (path for path in folder.rglob("*") if path.suffix.lower() in TEXT_FILES and path.is_file())
    texts = sorted(path.relative_to(folder).as_posix() for path in files if path.stem.lower() not in ABOUT_A_FOLDER)
    if texts and chosen is not None:
        log.warning("%d files of text in %s are left out, such as %s", len(texts), folder, texts[0])
    elif tables and texts:
        raise DataError(
            f"{folder} holds the tables {tables[:3]} and {len(texts)} files of text such as {texts[0]!r}. Name the "
            f"table that is the corpus, or move the tables or the texts to a folder of their own"
        )


def _report_left_out(folder: Path, read: list[Path]) -> None:
    others = [path for path in folder.rglob("*") if path.is_file() and path not in set(read)]
    visible = sorted(path for path in others if not is_hidden(path.relative_to(folder)))
    if visible:
        log.warning(
            "%d files in %s are left out, such as %s: files of text are read, of the kinds %s",
            len(visible), folder, visible[0].name, ", ".join(TEXT_FILES),
        )  # fmt: skip


def _from_files(paths: list[Path], root: Path, on_bad_row: OnBadRow) -> Iterator[Document]:
    for path in paths:
        try:
            title, text = read_text_file(path)
        except DataError as error:
            _bad(str(error), on_bad_row, "Mend or move the file, or leave such files out with on_bad_row='skip'")
            continue
        yield Document(path.relative_to(root).as_posix(), title, text, str(path))


def _from_rows(rows: Rows, columns: Columns, on_bad_row: OnBadRow) -> Iterator[Document]:
    for problem in rows.skipped:
        log.warning("left out: %s", problem)
    has_ids: bool | None = None  # whether the rows before have ids
    for index in range(len(rows)):
        found = _document(rows[index], rows.where(index), index, columns, has_ids)
        if isinstance(found, Document) and has_ids is None:
            has_ids = rows[index].get(columns.id) is not None
        if isinstance(found, str):
            _bad(
                f"{rows.where(index)}: {found}",
                on_bad_row,
                "Name the columns, mend the row, or leave such rows out with on_bad_row='skip'",
            )
        else:
            yield found


def _document(row: Row, place: str, index: int, columns: Columns, has_ids: bool | None) -> Document | str:
    """The document of a row, or what is wrong with it.

    Args:
        row: The row.
        place: Its file and line.
        index: Its number.
        columns: Which columns hold what.
        has_ids: Whether the rows before have ids; None for the first row.
    """
    text = row.get(columns.text)
    if not isinstance(text, str):
        return f"no text in column {columns.text!r}, got {type(text).__name__}; it has {sorted(row)}"
    if not text.strip():
        return f"the text in column {columns.text!r} is empty"
    if wrong := _wrong_id(row, columns.id, has_ids):
        return wrong
    id = _read_text(row, columns.id, str(index))
    return Document(id, _read_text(row, columns.title, ""), text, _read_text(row, columns.source, place))


def _wrong_id(row: Row, column: str, has_ids: bool | None) -> str | None:
    """What is wrong with the id of a row, if anything."""
    id = row.get(column)
    if id is None and column and has_ids is not False:
        like_ids = [name for name in row if re.sub(r"[\W_]", "", str(name)).casefold() in LIKE_IDS]
        if has_ids:
            return f"no id in column {column!r}, though earlier rows have one"
        if like_ids:
            return (
                f"no column {column!r}, but {like_ids[0]!r} looks like ids: name it by data.corpus_columns.id or "
                f"--id-column, or set that to an empty text to number the documents"
            )
    if id is not None and has_ids is False:
        return f"an id in column {column!r}, though earlier rows have none"
    if isinstance(id, str) and not id.strip():
        return f"the id in column {column!r} is empty"
    is_whole = (isinstance(id, int) and not isinstance(id, bool)) or (isinstance(id, float) and id.is_integer())
    is_id = id is None or isinstance(id, str) or is_whole
    return None if is_id else f"column {column!r} must hold a text or a whole number, got {id!r}"


def _read_text(row: Row, column: str, otherwise: str) -> str:
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes numbers with gaps floats
    return otherwise if value is None else str(value)


def _bad(problem: str, on_bad_row: OnBadRow, way_out: str) -> None:
    if on_bad_row == "raise":
        raise DataError(f"{problem}. {way_out}")
    log.warning("left out: %s", problem)
