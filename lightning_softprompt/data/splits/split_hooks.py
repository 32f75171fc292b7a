"""`SplitHooks`: how a data module prepares its splits, and what it may override in this."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

from lightning_softprompt.core.types import Example
from lightning_softprompt.data.prepared import PreparedRows, Split
from lightning_softprompt.data.readers.sources import DataError, NoSplitError, Origin, Rows
from lightning_softprompt.data.splits.loader_hooks import LoaderHooks
from lightning_softprompt.data.splits.row_encoder import RowEncoder
from lightning_softprompt.data.splits.row_source import RowSource

log = logging.getLogger(__name__)


class SplitHooks(LoaderHooks):
    """Reads, converts, holds out, selects and encodes the rows of the splits of a data module.

    Args:
        row_source: Reads the rows of each split.
        cache: Whether to cache tokenized rows on disk.
    """

    def __init__(self, row_source: RowSource, cache: bool) -> None:
        super().__init__()
        self._row_source, self.cache = row_source, cache
        self._prepared: dict[str, PreparedRows] = {}
        self._training_rows: tuple[list[Example], list[Origin]] | None = None  # before rows are held out
        self._has_logged_parts = False

    @abstractmethod
    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row of the source to text.

        Args:
            row: The row.
            labelled: Whether the row has an answer; rows to predict have none.

        Raises:
            ValueError: If the row cannot be used. The caller adds file and line to the message.
        """

    def select_rows(self, examples: Sequence[Example]) -> Sequence[int]:
        """Returns the indices of the training rows to use."""
        return range(len(examples))

    @property
    @abstractmethod
    def needed_columns(self) -> tuple[str, ...]:
        """The columns that each row must have. They identify tables and plain text on standard input."""

    @property
    @abstractmethod
    def _encoder(self) -> RowEncoder:
        """Converts rows from text to tokens."""

    @final
    def split(self, name: Split) -> PreparedRows:
        """Returns a tokenized split, which is prepared on first use.

        Raises:
            ValueError: If the split has no source, or a row cannot be used.
        """
        if name not in self._prepared:
            self._prepared[name] = self.prepare_split(name)
        return self._prepared[name]

    def rows(self, name: Split) -> Rows:
        """Returns the rows of a split as they were read from its source.

        Raises:
            ValueError: If the split has no source.
        """
        return self._row_source.read(name, self.needed_columns)

    def set_rows(self, name: Split, rows: Rows) -> None:
        """Replaces the source of a split by rows that are in memory."""
        self._row_source.set_rows(name, rows)
        self._prepared.pop(name, None)
        self._training_rows = None

    def prepare_split(self, name: Split) -> PreparedRows:
        """Reads, selects and encodes the rows of a split.

        A data module of several sources overrides it. Others override `example`, `select_rows`, `convert_rows` or
        `hold_out_rows`. Call `split` to use the rows, which calls this method once.

        Raises:
            ValueError: If the split has no source, a row cannot be used, or no rows are left.
        """
        if self._is_held_out(name):
            examples, origins = self.hold_out_rows(name)
        else:
            examples, origins = self.convert_rows(name)
        if name == "train":
            selected = self.select_rows(examples)
            examples = [examples[i] for i in selected]
            origins = [origins[i] for i in selected]
        if not examples:
            raise ValueError(self._explain_empty(name))
        use_cache = self.cache and name != "predict"
        return PreparedRows(examples, self._encoder.encode_split(name, examples, origins, use_cache), origins)

    def _explain_empty(self, name: Split) -> str:
        count = 0 if self._training_rows is None else len(self._training_rows[0])
        if not count:
            return f"no {name} rows are left to use"
        return (
            f"no {name} rows are left to use: {self._row_source.validation_share} of the {count} training rows, at "
            "least one, are held out for validation. Set data.validation, or add training rows"
        )

    def _is_held_out(self, name: Split) -> bool:
        """Whether the rows of a split are a part of the training rows in the source."""
        if self._row_source.divides_file:
            return name == "train" or name in self._row_source.shares_of_file
        return name in ("train", "validation") and not self._has_validation

    @cached_property
    def _has_validation(self) -> bool:
        source = self._row_source
        if source.sources["validation"] is not None:
            return True
        if source.path is None:
            return False
        try:
            self.rows("validation")
        except NoSplitError as error:
            splits = f"it has {' and '.join(error.splits)}" if error.splits else "see data.validation"
            share = f"{source.validation_share:.0%} of the training rows"
            log.info("%s has no validation split (%s); %s are held out for validation", source.path, splits, share)
            return False
        return True

    def hold_out_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Returns the training rows without the held-out rows, or the rows held out for validation.

        Override it to keep related rows on one side.

        Args:
            name: `train` or `validation`; also `test` if `path` is a file.
        """
        if self._training_rows is None:  # read the rows, and report skipped ones, only once for both splits
            self._training_rows = self.convert_rows("train")
        examples, origins = self._training_rows
        parts = self._row_source.divide(examples)
        if self._row_source.divides_file and not self._has_logged_parts:
            self._has_logged_parts = True
            self.log_once(self._row_source.describe_parts(parts, examples))
        part = parts[name]
        return [examples[i] for i in part], [origins[i] for i in part]

    def convert_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Converts the rows of a split to text, one by one with `example`, and reports rows that cannot be used.

        Override it for work on all rows of a split at once, such as a search.

        Raises:
            DataError: If a row cannot be used and on_bad_row is `raise`, or if all rows were skipped.
        """
        rows = self.rows(name)
        examples, origins, bad = [], [], list(rows.skipped)
        for i, row in enumerate(rows):
            try:
                example = self.example(row, labelled=name != "predict")
                if self._row_source.on_bad_row == "skip":
                    self._encoder.encode(example)
                examples.append(example)
                origins.append(rows.origin(i))
            except ValueError as error:
                if self._row_source.on_bad_row == "raise":
                    raise DataError(f"{rows.where(i)}: {error}") from None
                bad.append(f"{rows.where(i)}: {error}")
        if bad and not examples:
            raise DataError(f"no {name} rows are left to use: all {len(bad)} were skipped, the first: {bad[0]}")
        if bad:
            log.warning("%d of the %s rows were skipped, the first: %s", len(bad), name, bad[0])
        return examples, origins
