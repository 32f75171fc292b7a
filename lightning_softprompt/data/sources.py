"""Where rows come from: files, folders, standard input, the `datasets` hub, memory.

Every row keeps the place it came from, so that a complaint about it can name file and line.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

Row = Mapping[str, Any]
OnBadRow = Literal["raise", "skip"]
Parsed = Iterator[tuple[int, Row | str]]  # a number to find the row by, and the row, or what is wrong with it

LINE, INDEX = "{name}:{number}", "row {number} of {name}"  # lines count from 1, rows without lines from 0
BOM = b"\xef\xbb\xbf"
VALIDATION = ("validation", "valid", "val", "dev")  # names in use for the same split


class DataError(ValueError):
    """Data that cannot be read; the message says where, why and what to do."""


class NoSplitError(DataError):
    """A source that can be read, but lacks the split that is wanted."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows, each with the place it came from.

    Args:
        store: The rows.
        name: The file, or what stands for it.
        place: How a place is written, with `{name}` and `{number}`.
        numbers: Each row's line or index; None where that is its index here.
        skipped: What was wrong with the rows that were left out, place included.
    """

    store: Sequence[Row]
    name: str
    place: str = INDEX
    numbers: Sequence[int] | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Row:
        return self.store[index]

    def __iter__(self) -> Iterator[Row]:
        return (self.store[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """The place of a row, such as `train.jsonl:17` or `row 16 of train.parquet`."""
        number = index if self.numbers is None else self.numbers[index]
        return self.place.format(name=self.name, number=number)

    def only(self, indices: Sequence[int]) -> Rows:
        """Some of them, each with its place."""
        numbers = [index if self.numbers is None else self.numbers[index] for index in indices]
        return Rows([self.store[index] for index in indices], self.name, self.place, numbers)


def read_rows(source: str | Path | Sequence[Row], split: str | None = None, on_bad_row: OnBadRow = "raise") -> Rows:
    """Read all rows of a source.

    Args:
        source: A file of JSON lines (.jsonl, .ndjson), of a JSON list (.json), of CSV, TSV (no quoting) or Parquet; a
            folder with one such file for each split, or saved by `datasets`; `-` for standard input, JSON lines or
            plain text, which becomes the column `text`; else the name of a data set on the hub, `name` or
            `name:config`; or the rows themselves.
        split: Which split to take of a folder or a hub data set; a file is one split already. `validation` is also
            found as valid, val or dev.
        on_bad_row: Whether a row that cannot be read is an error, or is skipped and told in `Rows.skipped`.

    Raises:
        DataError: If there is nothing to read, or a row is bad and may not be skipped.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be 'raise' or 'skip', got {on_bad_row!r}")
    if not isinstance(source, str | Path):
        return _collect(_check(source), "the given rows", INDEX, on_bad_row)
    if str(source) == "-":
        return _collect(_json_lines(sys.stdin.buffer, plain_text=True), "standard input", LINE, on_bad_row)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, on_bad_row)
    if path.exists():
        return _read_file(path, on_bad_row)
    if _may_be_on_hub(str(source)):
        return _read_hub(str(source), split)
    raise DataError(_missing(path))


def _collect(parsed: Parsed, name: str, place: str, on_bad_row: OnBadRow) -> Rows:
    rows: list[Row] = []
    numbers, skipped = array("q"), []
    for number, row in parsed:
        if not isinstance(row, str):
            rows.append(row)
            numbers.append(number)
            continue
        skipped.append(f"{place.format(name=name, number=number)}: {row}")
        if on_bad_row == "raise":
            raise DataError(f"{skipped[-1]}. Mend the row, or leave such rows out with on_bad_row='skip'")
    if rows:
        return Rows(rows, name, place, numbers, tuple(skipped))
    if skipped:
        raise DataError(f"{name} has no row that can be read; the first of {len(skipped)}: {skipped[0]}")
    raise DataError(f"{name} has no rows; check that it was written to the end")


def _check(rows: Iterable[object], escaped: bool = False) -> Parsed:
    for index, row in enumerate(rows):
        if isinstance(row, Mapping):
            yield index, (_not_whole(row) if escaped else None) or row
        else:
            yield index, f"wanted columns and their values, got {_short(row)}"


def _not_whole(row: object) -> str | None:
    """What is wrong with a row that holds half a surrogate pair, which would break tokenizers much later."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return _not_utf8(error)
    return None


def _read_file(path: Path, on_bad_row: OnBadRow) -> Rows:
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path} is of no known kind; wanted one of {', '.join(READERS)}. Convert or rename it")
    return read(path, on_bad_row)


def _read_json_lines(path: Path, on_bad_row: OnBadRow) -> Rows:
    with path.open("rb") as file:
        return _collect(_json_lines(file), str(path), LINE, on_bad_row)


def _read_json(path: Path, on_bad_row: OnBadRow) -> Rows:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    if not start.startswith(b"["):  # many a .json file holds JSON lines
        return _read_json_lines(path, on_bad_row)
    content = path.read_bytes().removeprefix(BOM)
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg}. Mend the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}. Save it as UTF-8") from error
    return _collect(_check(rows, rb"\ud" in content.lower()), str(path), INDEX, on_bad_row)


def _json_lines(file: BinaryIO, plain_text: bool = False) -> Parsed:
    for number, line in enumerate(file, start=1):
        content = (line.removeprefix(BOM) if number == 1 else line).strip()
        if content:
            yield number, _json_row(content, plain_text)


def _json_row(line: bytes, plain_text: bool) -> Row | str:
    try:
        text = line.decode()
        if plain_text and not re.match(r'\{\s*["}]', text):
            return {"text": text}
        row = json.loads(text)
        if rb"\ud" in line.lower() and (wrong := _not_whole(row)):
            return wrong
    except UnicodeError as error:
        return _not_utf8(error)
    except (ValueError, RecursionError) as error:
        return f"broken JSON: {error}; wanted one object a line"
    return row if isinstance(row, dict) else f"wanted a JSON object, got {_short(row)}"


def _read_table(path: Path, on_bad_row: OnBadRow, delimiter: str, quoting: Literal[0, 3]) -> Rows:
    with path.open("rb") as file:
        return _collect(_csv_rows(file, path, delimiter, quoting), str(path), LINE, on_bad_row)


def _csv_rows(file: BinaryIO, path: Path, delimiter: str, quoting: Literal[0, 3]) -> Parsed:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than many a document
    wrong: dict[int, str] = {}
    reader = csv.reader(_decoded(file, wrong), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, f"broken quoting: {error}"
            continue
        bad = next((wrong[line] for line in range(first, reader.line_num + 1) if line in wrong), None)
        if header is None:
            header = _header(cells, f"{path}:{first}", bad)
        elif cells or bad:
            yield first, bad or _csv_row(header, cells)


def _header(cells: list[str], place: str, bad: str | None) -> list[str]:
    if twice := sorted({name for name in cells if cells.count(name) > 1}):
        bad = f"the columns {twice} are named more than once"
    if bad or not cells:
        raise DataError(f"{place}: {bad or 'the names of the columns are missing'}. Mend the first line")
    return cells


def _csv_row(header: list[str], cells: list[str]) -> Row | str:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return f"wanted {len(header)} cells, one for each of {header}, got {len(cells)}"


def _decoded(file: BinaryIO, wrong: dict[int, str]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            wrong[number] = _not_utf8(error)
            yield content.decode(errors="replace")


def _read_parquet(path: Path, on_bad_row: OnBadRow) -> Rows:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            rows = [row for batch in table.iter_batches() for row in batch.to_pylist()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no Parquet file, or a broken one: {error}. Write it again") from error
    return _collect(_check(rows), str(path), INDEX, on_bad_row)


READERS: dict[str, Callable[[Path, OnBadRow], Rows]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": partial(_read_table, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    # By its definition, and in GLUE, TSV does not quote: a cell may begin with a quotation mark and not end with one.
    ".tsv": partial(_read_table, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _read_parquet,
}


def _read_folder(folder: Path, split: str | None, on_bad_row: OnBadRow) -> Rows:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _from_datasets(lambda datasets: datasets.load_from_disk(str(folder)), str(folder), split)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
    name = _pick_split({path.stem for path in files}, split, str(folder))
    found = [path for path in files if path.stem == name]
    if len(found) > 1:
        raise DataError(f"{folder} has {[path.name for path in found]} for the same split. Name one of the files")
    return _read_file(found[0], on_bad_row)


def _read_hub(source: str, split: str | None) -> Rows:
    name, _, config = source.partition(":")
    return _from_datasets(lambda datasets: datasets.load_dataset(name, config or None), source, split)


def _from_datasets(load: Callable[[Any], Any], name: str, split: str | None) -> Rows:
    import datasets

    try:
        loaded = load(datasets)
    except Exception as error:  # the hub's client raises whatever its network layers do
        raise DataError(
            f"{name} could not be loaded by the package datasets ({type(error).__name__}: {str(error)[:300]}). "
            "If it is a file or folder, there is none of that name here; if it is on the hub, check name and network"
        ) from error
    if isinstance(loaded, dict):
        chosen = _pick_split(loaded, split, name)
        loaded, name = loaded[chosen], f"{name}[{chosen}]"
    if not len(loaded):
        raise DataError(f"{name} has no rows; choose another split")
    return Rows(loaded, name)


def _pick_split(known: Iterable[str], split: str | None, name: str) -> str:
    known = sorted(known)
    wanted = known if split is None else [split]
    if split in VALIDATION:
        wanted += VALIDATION
    found = [candidate for candidate in dict.fromkeys(wanted) if candidate in known]
    if not found or (split is None and len(found) > 1):
        raise NoSplitError(f"{name} has the splits {known}, wanted {split or 'one of them'!r}. Name a split it has")
    return found[0]


def _may_be_on_hub(source: str) -> bool:
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", source)
    # A misspelt path should not go there: without a network, the hub's client tries for half a minute.
    is_near = "/" in source and Path(source).parent.is_dir()
    return is_name is not None and not is_near and Path(source).suffix.lower() not in READERS


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}. Check the path"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()])
    return f"{path} does not exist. " + (f"Did you mean {' or '.join(near)}?" if near else "Check the path")


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _not_utf8(error: UnicodeError) -> str:
    return f"not UTF-8 ({error}); save the file as UTF-8"
