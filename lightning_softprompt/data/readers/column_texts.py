"""The text of the columns that a template inserts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_softprompt.core.template import Template
from lightning_softprompt.data.readers.sources import first_columns


def extract_texts(
    template: Template, row: Mapping[str, Any], filled: Mapping[str, str], requires_text: bool
) -> dict[str, str]:
    """Returns the text of each column of a template.

    Args:
        template: The template.
        row: The row.
        filled: Values of columns that the source does not have because they are computed later.
        requires_text: Whether to refuse a row whose columns are all empty.

    Raises:
        ValueError: If a column is missing or not text, or if all of them are empty and a text is required.
    """
    needed = [column for column in template.columns if column not in filled]
    for column in needed:
        if column not in row:
            raise ValueError(
                f"no column {column!r}; the row has {first_columns(row)}: name its columns in data.template, such "
                f"as {template.text.replace(f'{{{column}}}', f'{{{_longest_text_column(row)}}}')!r}"
            )
        if not isinstance(row[column], str):
            raise ValueError(f"column {column!r} must be text, got {row[column]!r} ({type(row[column]).__name__})")
    if requires_text and not any(row[column].strip() for column in needed):
        raise ValueError(" and ".join(f"column {column!r} is empty" for column in needed))
    values = {**row, **filled}
    return {column: values[column] for column in template.columns}


def _longest_text_column(row: Mapping[str, Any]) -> str:
    """The column with the longest text, which a classification most likely reads."""
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    return max(texts, key=lambda name: len(texts[name]), default="column")
