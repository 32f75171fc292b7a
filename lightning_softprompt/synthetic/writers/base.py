"""The base class of writers: which texts the model generates for a row, one after the other."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Columns = dict[str, str]


@dataclass(frozen=True)
class Generated:
    """A text that the model generated.

    Args:
        text: The text.
        is_finished: Whether the model ended it, rather than the limit of tokens.
        num_tokens: Its number of tokens.
        logprob: Mean log-probability of its tokens, in nats, under the model that wrote it; None for an empty text.
    """

    text: str
    is_finished: bool
    num_tokens: int
    logprob: float | None


@dataclass(frozen=True)
class Step:
    """One text of a row that the model generates.

    Args:
        column: The column of the text.
        instruction: What the model is asked for; `{column}` inserts an earlier column. None for a trained prompt, which
            has a template of its own.
        opening: The beginning of the answer, which is not part of the text.
    """

    column: str
    instruction: str | None
    opening: str = ""


@dataclass(frozen=True)
class Request:
    """The columns from which a row is generated.

    Args:
        columns: The columns that steps can insert.
        source: Where they come from, such as a file and line; None if there are no source rows.
        values: Values of the row that no step inserts, such as its label.
    """

    columns: Columns
    source: str | None = None
    values: Mapping[str, Any] | None = None


class Writer(ABC):
    """Turns labels, keywords or documents into rows that the frozen model writes. A subclass is a frozen dataclass.

    Row `number` depends on its number, its own random generator, the source rows and the rows of earlier batches only,
    so that an interrupted file is continued with the same rows.
    """

    requires_source = False  # whether it requires source rows
    main_column = "text"  # the column whose length and log-probability the row reports

    @property
    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """The texts of a row that the model generates, in order."""

    @abstractmethod
    def request(self, number: int, generator: random.Random, source: Source, earlier: Sequence[Row]) -> Request:
        """Returns the columns of a row before its first step.

        Args:
            number: Number of the row, from 0.
            generator: Random generator of the row.
            source: The source rows; empty if there are none.
            earlier: The rows of all earlier batches.
        """

    def finish(self, columns: Columns, request: Request, earlier: Sequence[Row]) -> dict[str, Any]:
        """Returns the row: by default the values of its request and the generated columns.

        Args:
            columns: The columns of the request and the generated ones.
            request: The request.
            earlier: The rows of all earlier batches.
        """
        return {**(request.values or {}), **{step.column: columns[step.column] for step in self.steps}}


@dataclass(frozen=True)
class Source:
    """Source rows and their origins.

    Args:
        rows: The rows.
        origins: The origin of each, such as a file and line.
    """

    rows: Sequence[Row] = ()
    origins: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, index: int, column: str) -> str:
        """Returns the text of a column.

        Raises:
            ValueError: If the row has none.
        """
        value = self.rows[index].get(column)
        if not isinstance(value, str) or not value.strip():
            columns = sorted(map(str, self.rows[index]))
            raise ValueError(f"{self.origins[index]} has no text in the column {column!r}; its columns are {columns}")
        return value.strip()
