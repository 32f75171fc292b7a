"""Rows of JSON: one object a line, a list of objects, objects over several lines, and SQuAD's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

from lightning_softprompt.data.readers.rows import (
    BOM,
    INDEX,
    LINE,
    DataError,
    Parsed,
    Row,
    check,
    half_surrogate,
    not_utf8,
    short,
)

SPACE = re.compile(r"\s*")


def parse_json_lines(file: Iterable[bytes]) -> Parsed:
    """One object a line; blank lines are left out."""
    for number, line in enumerate(file, start=1):
        content = (line.removeprefix(BOM) if number == 1 else line).strip()
        if content:
            yield number, json_row(content)


def json_row(line: bytes) -> Row | str:
    """The object of a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
        if rb"\ud" in line.lower() and (problem := half_surrogate(row)):
            return problem
    except UnicodeError as error:
        return not_utf8(error)
    except (ValueError, RecursionError) as error:
        return f"broken JSON: {error}; expected one object a line"
    return row if isinstance(row, dict) else f"expected a JSON object, got {short(row)}"


def parse_json(content: bytes, name: str) -> tuple[Parsed, str]:
    """The rows of a `.json` file, and how their places are written.

    Args:
        content: A list of objects, objects one after the other, or an object with the rows under `data`.
        name: The file's name, for messages.

    Raises:
        DataError: If it is broken as a whole.
    """
    content = content.removeprefix(BOM)
    lines = list(BytesIO(content))
    if not content.lstrip().startswith(b"[") and _has_one_object_a_line(lines):
        return parse_json_lines(lines), LINE
    text = _decode(content, name)
    may_hold_surrogates = r"\ud" in text.lower()
    if text.lstrip().startswith("["):
        return check(unfold_articles(_load(text, name)), may_hold_surrogates), INDEX
    try:
        values = list(_stream(text, name))
    except DataError:
        if any(isinstance(json_row(line.strip()), dict) for line in lines):
            return parse_json_lines(lines), LINE
        raise
    if len(values) == 1 and (rows := unwrap_rows(values[0][1])) is not None:
        return check(rows, may_hold_surrogates), INDEX
    return iter(values), LINE


def _has_one_object_a_line(lines: Sequence[bytes]) -> bool:
    """Whether the first two lines with anything in them are objects; one line may hold a whole file."""
    filled = [line.strip() for line in lines if line.strip()][:2]
    return len(filled) != 1 and all(isinstance(json_row(line), dict) for line in filled)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {not_utf8(error)}") from error


def _load(text: str, name: str) -> list[Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: broken JSON: {error.msg}. Fix the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    return values if isinstance(values, list) else [values]


def _stream(text: str, name: str) -> Iterator[tuple[int, Row | str]]:
    """Values one after the other, as `jq` prints them, each with its first line."""
    decoder, at, line = json.JSONDecoder(), 0, 1
    while (start := _after_space(text, at)) < len(text):
        line += text.count("\n", at, start)
        try:
            value, at = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{error.lineno}: broken JSON: {error.msg}. Fix the file") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{line}: broken JSON: {error}. Fix the file") from error
        problem = half_surrogate(value) if isinstance(value, dict) else f"expected a JSON object, got {short(value)}"
        yield line, problem or value
        line += text.count("\n", start, at)


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return at if found is None else found.end()


def unwrap_rows(value: object) -> list[Any] | None:
    """The rows of an object that has a list `data` and plain values, such as the files of SQuAD."""
    if not isinstance(value, Mapping):
        return None
    rows = value.get("data")
    others = [other for name, other in value.items() if name != "data"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return None
    if _are_articles(rows):
        return squad_rows(rows)
    return None if any(isinstance(other, list | dict) for other in others) else rows


def unfold_articles(rows: list[Any]) -> list[Any]:
    """Returns the rows, or their questions if they are articles as in the files of SQuAD."""
    return squad_rows(rows) if _are_articles(rows) else rows


def _are_articles(rows: Sequence[Any]) -> bool:
    """Whether rows are articles of SQuAD, which have their questions in paragraphs."""
    return bool(rows) and all(isinstance(row, Mapping) and isinstance(row.get("paragraphs"), list) for row in rows)


def squad_rows(articles: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The questions of SQuAD's own files, in the form of its rows on the hub."""
    rows: list[Any] = []
    for article in articles:
        for paragraph in _objects(article, "paragraphs"):
            for question in _objects(paragraph, "qas"):
                common = {"title": article.get("title", ""), "context": paragraph.get("context", "")}
                rows.append({**common, **question, "answers": _answers(question)})
    return rows


def _answers(question: Mapping[str, Any]) -> dict[str, list[Any]]:
    answers = _objects(question, "answers")
    return {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}


def _objects(owner: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    values = owner.get(name)
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []
