"""Documents in one file of the cache folder, from which their text is read when it is used."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_softprompt.data.corpus.documents import Boundary, find_document_files, open_documents, read_text
from lightning_softprompt.data.readers.files import data_suffix, open_file, read_file
from lightning_softprompt.data.readers.folders import files_of_split
from lightning_softprompt.data.readers.json_rows import parse_json_lines
from lightning_softprompt.data.readers.rows import INDEX, LINE, DataError, File, OnBadRow, Parsed, Row, Rows
from lightning_softprompt.data.readers.sources import is_pattern, read_rows
from lightning_softprompt.data.token_cache import content_key
from lightning_softprompt.system.atomic_files import write_folder, write_if_possible
from lightning_softprompt.system.cache_dirs import cache_folder
from lightning_softprompt.system.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)
VERSION = 1  # of the files
TEXT_FILE, TABLE_FILE, DESCRIPTION_FILE = "text", "documents.safetensors", "description.json"
JSON_LINES = (".jsonl", ".ndjson")
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StoredDocuments(Sequence[Row]):
    """Rows with one column, whose text is in a file.

    Args:
        folder: The folder with the text.
        column: Name of the column.
        starts: [documents + 1] the byte at which each document begins, and the end of the last one.
        digest: A hash of all texts.
    """

    folder: Path
    column: str
    starts: Integers
    digest: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        start, end = self.starts[index : index + 2].tolist()
        return {self.column: self.read(start, end - start)}

    def read(self, start: int, size: int) -> str:
        """Returns the text at a position."""
        return self.read_bytes(start, size).decode()

    def read_bytes(self, start: int, size: int) -> bytes:
        """Returns the bytes at a position. Each call opens the file, so that data workers can use the object."""
        with (self.folder / TEXT_FILE).open("rb") as file:
            file.seek(start)
            return file.read(size)


def store_documents(
    source: Any, split: str | None, on_bad_row: OnBadRow, columns: Sequence[str], boundary: Boundary
) -> Rows:
    """Returns the documents of a split, after copying their text to the cache folder if it is not there.

    Memory is needed for the longest document only. Text files and JSON lines are read line by line; other files are
    read one after the other.

    Args:
        source: A file, a pattern or list of files, or a folder.
        split: The split of a folder.
        on_bad_row: Whether a document that cannot be read is an error, or is skipped.
        columns: The column of the text.
        boundary: What ends a document of a text file.

    Raises:
        DataError: If the source consists of no files, or a document cannot be read and may not be skipped.
    """
    column = columns[0]
    paths = list_files(source, split)
    stats = [path.stat() for path in paths]
    files = [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    key = content_key([VERSION, *files, split, column, boundary, on_bad_row])
    folder = cache_folder("corpora") / key
    if not (folder / DESCRIPTION_FILE).is_file():
        size = sum(stat.st_size for stat in stats)
        log.info("Copying the text of %s (%.3g GB) to %s", source, size / 1e9, folder)
        parts = parse_source(source, split, on_bad_row, column, boundary)
        write_folder(folder, lambda draft: _write(draft, parts, column, on_bad_row))
    return _load(folder, str(source), column)


def list_files(source: Any, split: str | None) -> list[Path]:
    """Returns the files of a split.

    Raises:
        DataError: If the source consists of no files.
    """
    if (texts := find_document_files(source, split)) is not None:
        return texts
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if is_pattern(str(source)):
            return [Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()]
        if path.is_file():
            return [path]
        if path.is_dir():
            saved = sorted(path.rglob("state.json"))
            return saved or files_of_split(path, split)
    elif source and all(isinstance(file, str | Path) for file in source):
        return [Path(file).expanduser() for file in source]
    raise DataError(f"data.stream requires files or a folder, and {str(source)[:80]!r} is neither; remove data.stream")


def parse_source(
    source: Any, split: str | None, on_bad_row: OnBadRow, column: str, boundary: Boundary
) -> Iterator[tuple[File, Parsed]]:
    """Yields each file of a source with its rows, which are read while they are used."""
    texts = find_document_files(source, split)
    if texts is not None:
        yield from open_documents(source, texts, column, boundary)
        return
    for path in list_files(source, split):
        if data_suffix(path) in JSON_LINES:
            with open_file(path) as file:
                yield File(str(path), LINE), parse_json_lines(file)
        else:
            is_saved = path.name == "state.json"
            rows = read_rows(source, split, on_bad_row) if is_saved else read_file(path, on_bad_row)
            yield File(rows.name, INDEX), iter(enumerate(rows))


def _write(folder: Path, parts: Iterator[tuple[File, Parsed]], column: str, on_bad_row: OnBadRow) -> None:
    starts, numbers, files, indices = array("q", [0]), array("q"), array("q"), array("q")
    names: list[tuple[str, str]] = []
    skipped: list[str] = []
    digest = blake2b(digest_size=16)
    with (folder / TEXT_FILE).open("wb") as out:
        for file, parsed in parts:
            names.append((file.name, file.place))
            for index, (number, row) in enumerate(parsed):
                text = _text_or_problem(row, column)
                if isinstance(text, str):
                    problem = f"{file.where(number)}: {text}"
                    if on_bad_row == "raise":
                        raise DataError(f"{problem}. Fix the document, or skip such documents with on_bad_row='skip'")
                    skipped.append(problem)
                    continue
                out.write(text)
                digest.update(len(text).to_bytes(8, "little") + text)
                starts.append(starts[-1] + len(text))
                numbers.append(number)
                files.append(len(names) - 1)
                indices.append(index)
    if not numbers:
        problems = "".join(f", the first problem: {problem}" for problem in skipped[:1])
        raise DataError(f"{names[0][0]} has no rows{problems}; check that it was written to the end")
    columns = {"starts": starts, "numbers": numbers, "files": files, "indices": indices}
    write_tensors(
        folder / TABLE_FILE, {name: torch.from_numpy(np.array(values, np.int64)) for name, values in columns.items()}
    )
    description = {"files": names, "skipped": skipped, "digest": digest.hexdigest()}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description))


def _text_or_problem(row: Row | str, column: str) -> bytes | str:
    """The text of a row in UTF-8, or what is wrong with it."""
    if isinstance(row, str):
        return row
    try:
        return read_text(row, column).encode()
    except ValueError as error:
        return str(error)


def _load(folder: Path, name: str, column: str) -> Rows:
    table = {name: tensor.numpy() for name, tensor in read_tensors(folder / TABLE_FILE).items()}
    description = json.loads((folder / DESCRIPTION_FILE).read_text())
    files = [File(*file) for file in description["files"]]
    is_single = len(files) == 1
    return Rows(
        StoredDocuments(folder, column, table["starts"], description["digest"]),
        files[0].name if is_single else name,
        files[0].place,
        numbers=_IntegersAsInts(table["numbers"]),
        skipped=tuple(description["skipped"]),
        indices=_IntegersAsInts(table["indices"]),
        files=None if is_single else _Selected(files, table["files"]),
    )


@dataclass(frozen=True, eq=False)
class _IntegersAsInts(Sequence[int]):
    """An array as Python integers."""

    values: Integers

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return int(self.values[index])


@dataclass(frozen=True, eq=False)
class _Selected(Sequence[File]):
    """The file of each document."""

    files: list[File]
    numbers: Integers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> File:  # type: ignore[override]
        return self.files[self.numbers[index]]


def load_or_index(folder: Path, name: str, make: Callable[[], dict[str, Integers]]) -> dict[str, Integers]:
    """Returns the arrays of a file in the folder of stored documents; creates the file if it does not exist."""
    path = folder / f"{name}.safetensors"
    if path.is_file():
        return {key: tensor.numpy() for key, tensor in read_tensors(path).items()}
    arrays = make()
    tensors = {key: torch.from_numpy(values) for key, values in arrays.items()}
    write_if_possible(path, lambda draft: write_tensors(draft, tensors))
    return arrays
