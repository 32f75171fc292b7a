"""Rows of standard input and of text files: JSON in any layout, a table, or plain text."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Collection, Sequence
from io import BytesIO
from typing import Any

from lightning_softprompt.data.readers.csv_rows import parse_table
from lightning_softprompt.data.readers.json_rows import json_row, parse_json
from lightning_softprompt.data.readers.rows import BOM, INDEX, LINE, Parsed, Row, not_utf8

log = logging.getLogger(__name__)
TEXT = "text"  # the column of plain text, if the template does not name a single one
KEY = r'"(?:[^"\\]|\\.)*"'
OBJECT = re.compile(rf'\{{\s*({KEY}\s*(:|$)|"(?:[^"\\]|\\.)*$|\}}$|$)')
LIST_OF_NAMED = re.compile(rf"\[\s*\{{\s*{KEY}\s*:")
LIST_OF_OBJECTS = re.compile(r"\[\s*($|\{\s*[\"}])")
NAMES = re.compile(r"[A-Za-z_]\w*([,;|\t] ?[A-Za-z_]\w*)+")
DELIMITERS = (",", "\t", ";", "|")


def parse_text(content: bytes, name: str, columns: Collection[str] = ()) -> tuple[Parsed, str]:
    """The rows of a text, and how their places are written.

    Args:
        content: JSON lines, a JSON list, objects over several lines, CSV or TSV whose first line names the columns
            that are needed, or plain text, of which each line is a row. JSON lines and plain lines may be mixed.
        name: Name of the text, for messages.
        columns: The columns that are needed. Plain text becomes the only one of them, or the column `text`.

    Raises:
        DataError: If it is broken as a whole.
    """
    content = content.removeprefix(BOM)
    column = next(iter(columns)) if len(columns) == 1 else TEXT
    if (texts := _list_of_texts(content)) is not None:
        return iter([(index, {column: text}) for index, text in enumerate(texts)]), INDEX
    if _is_json_document(content):
        return parse_json(content, name)
    lines = list(BytesIO(content))
    filled = [line for line in lines if line.strip()]
    delimiter = _delimiter(filled, columns)
    if delimiter is not None:
        return parse_table(lines, name, delimiter), LINE
    _warn_of_a_table(filled, name)
    _warn_of_json_texts(filled, name)
    return _lines(lines, column), LINE


def _list_of_texts(content: bytes) -> list[str] | None:
    """The texts of a JSON list of nothing else."""
    values = _json_list(content)
    return values if values is not None and all(isinstance(value, str) for value in values) else None


def _json_list(content: bytes) -> list[Any] | None:
    if not content.lstrip().startswith(b"["):
        return None
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _is_json_document(content: bytes) -> bool:
    """Whether a text is a JSON list of rows, or objects of which one takes several lines or wraps the rows."""
    start = content.strip()
    first = start.partition(b"\n")[0].strip()
    if start.startswith(b"["):
        begins = LIST_OF_OBJECTS.match(first.decode(errors="replace")) is not None
        return begins or not all(isinstance(value, int | float) for value in _json_list(content) or [])
    if not start.startswith(b"{"):
        return False
    if isinstance(json_row(first), dict):
        return first == start
    return first == b"{" or _is_stream(content)


def _is_stream(content: bytes) -> bool:
    try:
        rows, _ = parse_json(content, "")
        return all(isinstance(row, dict) for _, row in rows)
    except ValueError:
        return False


def _delimiter(lines: Sequence[bytes], columns: Collection[str]) -> str | None:
    """The delimiter of a table whose first line names all needed columns; None if it is not such a table."""
    if not lines or not columns:
        return None
    header = lines[0].decode(errors="replace").strip("\r\n")
    for delimiter in DELIMITERS:
        cells = _cells(header, delimiter)
        has_names = set(columns) <= set(cells) and all(cell and cell == cell.strip() for cell in cells)
        if has_names and len(cells) + len(lines) > 2:  # one name alone is a text
            return delimiter
    return None


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a text, such as a document without line breaks
        return []


def _warn_of_a_table(lines: Sequence[bytes], name: str) -> None:
    if len(lines) > 1 and NAMES.fullmatch(first := lines[0].decode(errors="replace").strip()):
        log.warning(
            "%s is read as plain text, though its first line %r looks like the columns of a table; name the columns "
            "that the template needs, or give a file",
            name, first[:100],
        )  # fmt: skip


def _warn_of_json_texts(lines: Sequence[bytes], name: str) -> None:
    """Warns where every line is a text of JSON, as `jq .text` writes them."""
    if lines and all(line.startswith(b'"') and _is_json_text(line) for line in lines):
        log.warning(
            "%s is read as plain text, so the quotation marks around each line stay in it; jq leaves them out with -r",
            name,
        )


def _is_json_text(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), str)
    except ValueError:
        return False


def _lines(lines: Sequence[bytes], column: str) -> Parsed:
    for number, line in enumerate(lines, start=1):
        if content := line.strip():
            yield number, _line(content, column)


def _line(line: bytes, column: str) -> Row | str:
    try:
        text = line.decode()
    except UnicodeError as error:
        return not_utf8(error)
    return json_row(line) if _is_meant_as_json(text) else {column: text}


def _is_meant_as_json(line: str) -> bool:
    """Whether a line is a JSON object or a list of them, whole or broken; `{"quote"} is a set literal` is a text."""
    if OBJECT.match(line) or LIST_OF_NAMED.match(line):
        return True
    within = line.removeprefix("{").lstrip()
    return line.startswith("{") and line.endswith("}") and ":" in within and within.startswith(("'", '"'))
