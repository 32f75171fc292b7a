"""Where rows come from: files, folders, standard input, the `datasets` hub, memory.

Every row keeps the place it came from, so that a complaint about it can name file and line.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lightning_softprompt.data.readers.content_kind import refuse_other_content
from lightning_softprompt.data.readers.files import READERS, TEXT_SUFFIXES, data_suffix, read_file
from lightning_softprompt.data.readers.folders import files_of_split, pick_split
from lightning_softprompt.data.readers.rows import (
    BOM,
    INDEX,
    DataError,
    NoSplitError,
    OnBadRow,
    Origin,
    Row,
    Rows,
    check,
    collect,
    first_columns,
    join,
)
from lightning_softprompt.data.readers.text_rows import parse_text

__all__ = [
    "BOM",
    "READERS",
    "DataError",
    "NoSplitError",
    "OnBadRow",
    "Origin",
    "Row",
    "Rows",
    "first_columns",
    "is_pattern",
    "read_rows",
]
STANDARD_INPUT = "-"


def read_rows(
    source: str | Path | Sequence[Row] | Sequence[str],
    split: str | None = None,
    on_bad_row: OnBadRow = "raise",
    columns: Collection[str] = (),
) -> Rows:
    """Read all rows of a source.

    Args:
        source: A file of JSON lines (.jsonl, .ndjson), JSON (.json), CSV, TSV, Parquet or plain text (.txt),
            compressed (.gz, .bz2, .xz) or not; a pattern such as `data/*.jsonl` or a list of files, read one after the
            other; a folder with files for each split, as on the hub, or saved by `datasets`; `-` for standard input,
            which may be JSON, CSV, TSV or plain text; else the name of a data set on the hub, `name` or `name:config`;
            or the rows themselves.
        split: Which split to take of a folder or a hub data set; a file is one split already. `validation` is also
            found as valid, val or dev.
        on_bad_row: Whether a row that cannot be read is an error, or is skipped and reported in `Rows.skipped`.
        columns: The columns that are needed. Lines of plain text become the only one of them, or the column `text`.

    Raises:
        DataError: If there is nothing to read, or a row is bad and may not be skipped.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be 'raise' or 'skip', got {on_bad_row!r}")
    if isinstance(source, Mapping):
        raise DataError(_no_rows(source, split))
    if isinstance(source, str | Path):
        return _read_named(str(source), split, on_bad_row, columns)
    if source and all(isinstance(file, str | Path) for file in source):
        paths = [path for file in source for path in _files(str(file))]
        return _read_files(paths, on_bad_row, columns)
    return collect(check(source), "the given rows", INDEX, on_bad_row)


def _no_rows(source: Mapping[Any, Any], split: str | None) -> str:
    """The message about a mapping in place of rows."""
    return (
        f"rows must be a list of mappings, a datasets.Dataset or a pandas.DataFrame, got {type(source).__name__}; give "
        f"one split, such as splits[{split!r}]"
    )


def _read_named(source: str, split: str | None, on_bad_row: OnBadRow, columns: Collection[str]) -> Rows:
    if source == STANDARD_INPUT:
        name = "standard input"
        content = sys.stdin.buffer.read()
        refuse_other_content(content, name, is_named=False)
        parsed, place = parse_text(content, name, columns)
        return collect(parsed, name, place, on_bad_row)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, on_bad_row)
    if path.exists() or is_pattern(source):
        return _read_files(_files(source), on_bad_row, columns)
    if _may_be_on_hub(source):
        return _read_hub(source, split)
    raise DataError(_missing(path))


def is_pattern(source: str) -> bool:
    """Whether a source is a pattern of file names, such as `data/*.jsonl`."""
    return has_magic(source) and not Path(source).expanduser().exists()


def _files(source: str) -> list[Path]:
    """The file, or the files of a pattern by name."""
    path = Path(source).expanduser()
    if not is_pattern(source):
        if path.is_file():
            return [path]
        raise DataError(f"{path} is a folder; name its files" if path.is_dir() else _missing(path))
    found = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"no file matches {source}. Check the pattern")
    return found


def _read_files(paths: Sequence[Path], on_bad_row: OnBadRow, columns: Collection[str] = ()) -> Rows:
    name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files from {paths[0]}"
    return join([read_file(path, on_bad_row, columns) for path in paths], name)


def _read_folder(folder: Path, split: str | None, on_bad_row: OnBadRow) -> Rows:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _from_datasets(lambda datasets: datasets.load_from_disk(str(folder)), str(folder), split)
    if split is not None and (folder / split / "state.json").exists():
        return _read_folder(folder / split, None, on_bad_row)
    return _read_files(files_of_split(folder, split), on_bad_row)


def _read_hub(source: str, split: str | None) -> Rows:
    name, _, config = source.partition(":")
    return _from_datasets(lambda datasets: datasets.load_dataset(name, config or None), source, split)


def _from_datasets(load: Callable[[Any], Any], name: str, split: str | None) -> Rows:
    import datasets

    try:
        loaded = load(datasets)
    except IndexError as error:  # as `datasets` answers to a set that was saved without rows
        raise DataError(f"{name} has no rows, or is broken: datasets finds none in it. Save it with rows") from error
    except Exception as error:  # the hub's client raises whatever its network layers do
        raise DataError(
            f"{name} could not be loaded by the package datasets ({type(error).__name__}: {str(error)[:300]}). "
            "If it is a file or folder, there is none of that name here; if it is on the hub, check name and network"
        ) from error
    if isinstance(loaded, dict):
        chosen = pick_split(loaded, split, name)
        loaded, name = loaded[chosen], f"{name}[{chosen}]"
    if not len(loaded):
        raise DataError(f"{name} has no rows; choose another split")
    return Rows(loaded, name)


def _may_be_on_hub(source: str) -> bool:
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", source)
    # A misspelt path should not go there: without a network, the hub's client tries for half a minute.
    is_near = "/" in source and Path(source).parent.is_dir()
    return is_name is not None and not is_near and data_suffix(Path(source)) not in (*READERS, *TEXT_SUFFIXES)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}. Check the path"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()])
    return f"{path} does not exist. " + (f"Did you mean {' or '.join(near)}?" if near else "Check the path")
