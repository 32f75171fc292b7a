"""Text from files, printable on a terminal or a page: control characters and changes of direction are escaped."""

from __future__ import annotations

import logging
import re
from html import escape
from typing import Any, TextIO

CONTROL = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, delete, C1
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # marks, embeddings, overrides and isolates of writing direction
    r"\u2028\u2029\ufeff\ufff9-\ufffb"  # separators of lines, byte order mark, annotations
    r"\ud800-\udfff"  # halves of characters, which no terminal can encode
    r"\U000e0000-\U000e007f"  # tags, which nothing shows
)
LONGEST = 4000  # characters of a message
HIDDEN = re.compile(f"[{CONTROL}]")


def printable(text: object) -> str:
    r"""Text in which every character that controls a terminal or hides text is written as in JSON.

    >>> printable("a\x1b[2Jb\u202ec")
    'a\\u001b[2Jb\\u202ec'
    """
    return HIDDEN.sub(_escape, str(text))


def one_line(text: object) -> str:
    """Returns printable text with all white space as single spaces, truncated if it is too long for a message."""
    line = " ".join(printable(text).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def metric_name(text: object) -> str:
    r"""A name from data as part of the name of a metric or as a label of a plot: printable text of one line.

    >>> metric_name("good\n\x1b[2J")
    'good\\n\\u001b[2J'
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def shorten(value: object, length: int = 120) -> str:
    """Returns the representation of a value for a message, truncated.

    >>> shorten([10, 20, 30], length=5)
    '[10, ...'
    """
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def html_text(text: object) -> str:
    """Printable text as part of a page."""
    return escape(printable(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


class PrintableFormatter(logging.Formatter):
    """Formats records of a log as printable text."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return printable(super().format(record))


class PrintableStream:
    """A stream that writes printable text only, and otherwise behaves like another stream.

    Args:
        stream: The other stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes printable text."""
        self.stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
