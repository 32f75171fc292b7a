"""Which files of a folder hold a split: one file, the shards of one, or a folder of files, as on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_softprompt.data.readers.files import READERS, data_stem, data_suffix
from lightning_softprompt.data.readers.rows import DataError, NoSplitError

VALIDATION = ("validation", "valid", "val", "dev")  # names in use for the same split
SPLITS = ("train", "test", *VALIDATION)
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` notes
DATA = "data"  # the folder that hub data sets often have their files in
DEPTH = 3  # folders below which no files are looked for


@dataclass(frozen=True)
class SplitFile:
    """A file of a split.

    Args:
        path: The file.
        split: The name of the split, from the file or from its folder.
        config: The folder of the configuration that it belongs to, such as `sst2`; empty at the top.
        shard: Its number and how many there are, if it is one of several.
    """

    path: Path
    split: str
    config: str = ""
    shard: tuple[int, int] | None = None


def files_of_split(folder: Path, split: str | None) -> list[Path]:
    """The files that hold a split, in the order of their shards or names.

    Files at the top, and in folders there that are named as splits, come first. Only where none of them is of a usual
    split, files in `data` are looked for, and then those of a configuration, of which there may be one.

    Args:
        folder: The folder.
        split: The split; None takes the only one.

    Raises:
        NoSplitError: If the folder has no such split.
        DataError: If it is not clear which files hold it, or a shard is missing.
    """
    known: set[str] = set()
    for files in _levels(folder):
        names = {file.split for file in files}
        if (name := find_split(names, split)) is not None:
            return _order_files(folder, [file for file in files if file.split == name])
        known |= names
        if any(other.casefold() in SPLITS for other in names) or (names and split is None):
            break  # deeper folders belong to something else
    raise _no_split(known, split, str(folder)) if known else NoSplitError(_no_rows(folder, split))


def has_rows(folder: Path) -> bool:
    """Whether a folder or its sub-folders contain files of rows."""
    return next(_walk(folder, DEPTH), None) is not None


def _no_rows(folder: Path, split: str | None) -> str:
    found = [path.name for path in _visible(folder)]
    missing = "files of rows" if split is None else f"files of rows for the split {split!r}"
    others = f"it contains {found[:5]}{' and more' if len(found) > 5 else ''}" if found else "it is empty"
    return f"{folder} has no {missing}: {others}. Rows are read from {', '.join(READERS)}, compressed or not"


def _levels(folder: Path) -> Iterator[list[SplitFile]]:
    """The files that may contain splits, the most likely first."""
    top = list(_split_files(folder, folder, 1))
    top_splits = {file.split for file in top}
    named = [path for path in _visible(folder) if path.is_dir() and path.name.casefold() in SPLITS]
    in_folders = [file for path in named for file in _split_files(folder, path, DEPTH - 1)]
    yield [*top, *(file for file in in_folders if file.split not in top_splits)]
    below = list(_split_files(folder, folder, DEPTH))
    yield [file for file in below if not file.config]
    yield below


def find_split(known: Iterable[str], split: str | None) -> str | None:
    """The name under which a split is known, the exact one first, or None."""
    known = sorted(known)
    if split is None:
        return known[0] if len(known) == 1 else None
    names = [split, *(VALIDATION if split in VALIDATION else ())]
    exact = [name for name in names if name in known]
    in_capitals = [name for lower in names for name in known if name.casefold() == lower]
    return next(iter([*exact, *in_capitals]), None)


def pick_split(known: Iterable[str], split: str | None, name: str) -> str:
    """The name under which a split is known.

    Raises:
        NoSplitError: If it is not, or there are several to choose from.
    """
    known = sorted(known)
    if (found := find_split(known, split)) is None:
        raise _no_split(known, split, name)
    return found


def _no_split(known: Iterable[str], split: str | None, name: str) -> NoSplitError:
    splits = sorted(known)
    expected = repr(split) if split else "a single one"
    parts = [] if split is None else [known_name for known_name in splits if split in _words(known_name)]
    fix = f"If {parts} are parts of it, pass their files as a list or pattern" if parts else "Name one of its splits"
    return NoSplitError(f"{name} has the splits {splits}, expected {expected}. {fix}", splits)


def _words(name: str) -> list[str]:
    """The words of a file's name, such as `train` of `sst2_train-1`."""
    return re.findall(r"[a-z]+", name.casefold())


def _split_files(root: Path, folder: Path, depth: int) -> Iterator[SplitFile]:
    for path in _walk(folder, depth):
        shard = SHARD.fullmatch(data_stem(path))
        parents = [part for part in path.relative_to(root).parts[:-1] if part != DATA]
        split = shard["split"] if shard else data_stem(path)
        if parents and parents[-1].casefold() in SPLITS:
            split = parents.pop()
        numbers = (int(shard["number"]), int(shard["count"])) if shard else None
        yield SplitFile(path, split, "/".join(parents), numbers)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Files of rows, those at the top first."""
    visible = _visible(folder)
    files = (path for path in visible if path.name not in NO_ROWS)
    yield from (path for path in files if data_suffix(path) in READERS and path.is_file())
    if depth > 1:
        for path in visible:
            if path.is_dir() and not path.is_symlink():
                yield from _walk(path, depth - 1)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _order_files(folder: Path, files: Sequence[SplitFile]) -> list[Path]:
    configs = sorted({file.config for file in files})
    if len(configs) > 1:
        raise DataError(f"{folder} has the split in the folders {configs}. Name one of them: {folder / configs[0]}")
    if all(file.shard for file in files):
        return _shards(files)
    in_folder = all(file.path.parent.name == file.split for file in files)
    if len(files) > 1 and not (in_folder and len({data_suffix(file.path) for file in files}) == 1):
        names = [file.path.relative_to(folder).as_posix() for file in files]
        raise DataError(f"{folder} has {names} for the same split. Name one of the files")
    return [file.path for file in files]


def _shards(files: Sequence[SplitFile]) -> list[Path]:
    """The shards of a split in order; a split of which some are missing would be trained on in silence."""
    by_number = {file.shard[0]: file.path for file in files if file.shard}
    count = max(file.shard[1] for file in files if file.shard)
    if missing := [number for number in range(count) if number not in by_number]:
        raise DataError(
            f"{files[0].path} is one of {count} files, but number {missing[0]} of them is missing. Download it again"
        )
    if len(by_number) < len(files):
        raise DataError(f"{files[0].path.parent} has the same part of a split twice. Remove one of the files")
    return [by_number[number] for number in sorted(by_number)]
