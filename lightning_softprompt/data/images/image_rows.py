"""Reads rows of images: a folder for each class, or a file of rows with paths, bytes or arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_softprompt.data.images.image_files import SUFFIXES
from lightning_softprompt.data.readers.folders import SPLITS, find_split
from lightning_softprompt.data.readers.rows import DataError, NoSplitError, OnBadRow, Row, Rows
from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.data.splits.row_source import is_file


def read_image_rows(source: Any, split: str, on_bad_row: OnBadRow, columns: Sequence[str], label: str) -> Rows:
    """Returns the rows of a split.

    Args:
        source: A folder of images with a folder for each class, in a folder for each split or not; or a source of rows
            as in `read_rows`. Paths in a file of rows are relative to its folder.
        split: The split.
        on_bad_row: As in `read_rows`.
        columns: The column of the image.
        label: Name of the column of the class of a folder.

    Raises:
        DataError: If there are no rows, or one cannot be read.
    """
    folder = Path(source).expanduser() if isinstance(source, str | Path) else None
    if folder is not None and folder.is_dir() and is_image_folder(str(folder)):
        return _read_folder(folder, split, columns[0], label)
    return _resolve_paths(read_rows(source, split, on_bad_row, columns), columns[0])


def is_image_folder(path: str) -> bool:
    """Whether a folder contains images in folders of classes."""
    folder = Path(path).expanduser()
    return folder.is_dir() and next(_images(folder), None) is not None


def is_undivided(path: str) -> bool:
    """Whether the rows of a path are divided into splits here: a file, or folders of classes without splits."""
    return is_file(path) or (is_image_folder(path) and not _splits(Path(path).expanduser()))


def _splits(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir() and path.name.casefold() in SPLITS]


def _images(folder: Path) -> Iterator[Path]:
    """Images in folders of classes, which are below the folder or below the folders of its splits."""
    for path in sorted(folder.glob("*/**/*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            yield path


def _read_folder(folder: Path, split: str, image: str, label: str) -> Rows:
    splits = _splits(folder)
    root = folder
    if splits:
        name = find_split(splits, split)
        if name is None:
            raise NoSplitError(f"{folder} has the splits {sorted(splits)}, expected {split!r}", sorted(splits))
        root = folder / name
    rows = [{image: str(path), label: path.relative_to(root).parts[0]} for path in _images(root)]
    if not rows:
        raise DataError(f"{root} has no images in folders of classes; images end with {', '.join(SUFFIXES)}")
    return Rows(rows, str(root))


def _resolve_paths(rows: Rows, image: str) -> Rows:
    """Returns rows whose paths are relative to the working folder, and whose images are not decoded."""
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(rows.store, datasets.Dataset):
        is_image = isinstance(rows.store.features.get(image), datasets.Image)
        return replace(rows, store=rows.store.cast_column(image, datasets.Image(decode=False))) if is_image else rows
    names = [rows.name] * len(rows) if rows.files is None else [file.name for file in rows.files]
    return replace(rows, store=[_resolve_path(row, image, Path(name)) for row, name in zip(rows, names, strict=True)])


def _resolve_path(row: Row, image: str, file: Path) -> Row:
    value = row.get(image)
    if not isinstance(value, str) or not value or Path(value).expanduser().is_absolute() or not file.is_file():
        return row
    return {**row, image: str(file.parent / value)}
