"""The base class of filters."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_softprompt.core.word_boundaries import split_words

Row = Mapping[str, Any]
Reasons = list[str | None]  # of each row: why it is dropped; None if it is not


class Filter(ABC):
    """Selects among rows. A subclass is a frozen dataclass in a file of this folder."""

    @abstractmethod
    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns why each row is dropped; None for rows that pass.

        Raises:
            ValueError: If a row lacks a column that the filter requires.
        """


def text_of(row: Row, column: str) -> str:
    """Returns the text of a row.

    Raises:
        ValueError: If the column is missing or is not text.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"a filter requires text in the column {column!r}; the row has {sorted(map(str, row))}")
    return value


def words_of(text: str) -> list[str]:
    """Returns the lower-case words of a text."""
    return split_words(unicodedata.normalize("NFC", text).lower())
