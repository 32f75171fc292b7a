"""`RowSource`: reads, renames and divides the rows of the splits of a data module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_softprompt.core.types import Example
from lightning_softprompt.data.readers.sources import NoSplitError, OnBadRow, Rows, is_pattern, read_rows
from lightning_softprompt.data.sampling.holding_out import divide_many, divide_rows, hold_out_validation

Source = str | list[str] | list[dict[str, Any]]


def is_file(path: str) -> bool:
    """Whether a source is a single file, or a pattern of files."""
    return Path(path).expanduser().is_file() or is_pattern(path)


@dataclass
class RowSource:
    """The sources of the splits of a data module, each of which is read once.

    Args:
        path: Source of all splits.
        sources: The source of each split, instead of `path`.
        new_names: New column names by their names in the source.
        on_bad_row: Whether to stop at a row that cannot be read, or to skip it.
        validation_share: Fraction of the training rows to hold out if there are no validation rows.
        test_share: Fraction of the rows to hold out for the test if `path` is a file.
        seed: Seed of the held-out rows.
        reader: Reads the rows of a split of a source, as `read_rows` does.
        is_undivided: Whether the rows of a path are divided into splits here.
    """

    path: str | None
    sources: Mapping[str, Source | None]
    new_names: Mapping[str, str]
    on_bad_row: OnBadRow
    validation_share: float
    test_share: float
    seed: int
    reader: Callable[..., Rows] = read_rows
    is_undivided: Callable[[str], bool] = is_file
    _rows: dict[str, Rows] = field(default_factory=dict)

    def read(self, name: str, needed_columns: Sequence[str]) -> Rows:
        """Returns the rows of a split, with the new column names.

        Args:
            name: The split.
            needed_columns: New names of the columns that each row must have.

        Raises:
            NoSplitError: If the source has no such split.
            ValueError: If the split has no source.
        """
        if name not in self._rows:
            source = self.sources[name] if self.sources[name] is not None else self.path
            is_divided = source is self.path and self.divides_file
            if source is None or (is_divided and name != "train"):
                raise ValueError(f"no source of {name} rows; set data.{name} or data.path")
            old_names = {new: old for old, new in self.new_names.items()}
            columns = [old_names.get(column, column) for column in needed_columns]
            try:
                self.set_rows(name, self.reader(source, name, self.on_bad_row, columns))
            except NoSplitError as error:
                raise NoSplitError(f"{error}, or set data.{name}", error.splits) from None
        return self._rows[name]

    def set_rows(self, name: str, rows: Rows) -> None:
        """Replaces the source of a split by rows that are in memory."""
        self._rows[name] = rows.rename_columns(self.new_names)

    def clear(self) -> None:
        """Removes all rows from memory, so that they are read again."""
        self._rows.clear()

    @property
    def divides_file(self) -> bool:
        """Whether `path` is a single file, or a pattern of files, whose rows are divided here."""
        return self.path is not None and self.is_undivided(self.path)

    @property
    def shares_of_file(self) -> dict[str, float]:
        """The share of each split that is held out of a file; splits with another source are not."""
        shares = {"test": self.test_share, "validation": self.validation_share}
        return {name: share for name, share in shares.items() if share and self.sources[name] is None}

    def divide(self, examples: Sequence[Example]) -> dict[str, list[int]]:
        """Returns the indices of the rows of each split; those of a file are stratified by class."""
        if not self.divides_file:
            return hold_out_validation(len(examples), self.validation_share, self.seed)
        labels = [example.label for example in examples]
        known_labels = labels if has_classes(examples) else [None] * len(labels)
        return divide_rows(known_labels, self.shares_of_file, self.seed)

    def divide_many(self, count: int) -> dict[str, npt.NDArray[np.int64]]:
        """Returns the indices of the rows of each split, as `divide` does for rows without classes."""
        if self.divides_file:
            return divide_many(count, self.shares_of_file, self.seed)
        parts = hold_out_validation(count, self.validation_share, self.seed)
        return {name: np.array(rows, np.int64) for name, rows in parts.items()}

    def describe_parts(self, parts: Mapping[str, Sequence[int]], examples: Sequence[Example]) -> str:
        """Describes how the rows of a file are divided, for the log."""
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in parts.items())
        by_class = " and stratified by class" if has_classes(examples) else ""
        return f"{self.path}: divided into {counts} rows, at random by data.seed={self.seed}{by_class}"


def has_classes(examples: Sequence[Example]) -> bool:
    """Whether each row has a class."""
    return all(isinstance(example.label, int) for example in examples)


def convert_frame(source: Any) -> Any:
    """Returns the rows of a `pandas.DataFrame` as mappings; other sources unchanged. Does not import pandas."""
    is_frame = hasattr(source, "iterrows") and hasattr(source, "to_dict")
    return source.to_dict("records") if is_frame else source
