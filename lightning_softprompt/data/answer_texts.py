"""The right answers of a row: a text, a list of texts, or the form that SQuAD has on the hub; and its constraints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_softprompt.constraints.base import Constraint, read_constraints
from lightning_softprompt.data.labels import is_written_list
from lightning_softprompt.data.readers.rows import first_columns, short

WRITTEN_MAPPING = re.compile(r"""\{\s*(['"])(text|answer_start)\1\s*:""")


def read_answers(value: object, column: str) -> tuple[str, ...]:
    """The answers of a row without empty ones, each once.

    Args:
        value: None, a text, a list of texts, `{"text": [..], "answer_start": [..]}`, or a list of `{"text": ..}`.
        column: The column's name, for messages.

    Raises:
        ValueError: If it is something else, or a list that a table holds as text.

    >>> read_answers({"text": ["Paris", "Paris"], "answer_start": [3, 9]}, "answers")
    ('Paris',)
    """
    texts = _texts(value)
    if texts is None:
        raise ValueError(f"column {column!r} must be a text or a list of texts, got {short(value)}")
    for text in texts:
        check_is_no_list(text, column)
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def read_row_constraints(row: Mapping[str, Any], column: str) -> tuple[Constraint, ...]:
    """The verifiable constraints in a column of a row.

    Raises:
        ValueError: If the column is missing, or has no list of known constraints.
    """
    if column not in row:
        raise ValueError(f"no column {column!r}; the row has {first_columns(row)}: set data.constraints")
    return read_constraints(row[column])


def check_is_no_list(text: str, column: str) -> None:
    """Refuses a text that a table was given in place of a list.

    Raises:
        ValueError: If it is one.
    """
    if is_written_list(text) or WRITTEN_MAPPING.match(text.strip()):
        raise ValueError(
            f"column {column!r} holds a list written as text, {short(text)}: a table cannot hold lists. Save the rows "
            "as JSON lines or Parquet, or keep one answer in each cell"
        )


def _texts(value: object) -> list[str] | None:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return _texts(value["text"]) if "text" in value else None
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list | tuple):
        return None
    found = [item.get("text") if isinstance(item, Mapping) else item for item in value]
    texts = [text for text in found if isinstance(text, str)]
    return texts if len(texts) == len(found) else None
