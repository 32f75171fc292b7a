"""Divides documents into windows of a number of bytes, at white space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SPACES = (b" ", b"\t", b"\n", b"\r", b"\f", b"\v")


class Window(NamedTuple):
    """A stretch of a document.

    Args:
        text: The text.
        num_bytes: Its length in UTF-8.
        num_words: Words that begin in it.
    """

    text: str
    num_bytes: int
    num_words: int


def cut_windows(text: str, size: int) -> Iterator[Window]:
    """Yields the windows of a document, which join to its text.

    A window ends before white space, so that the next one begins with the space of its first word. A stretch without
    white space that is longer than a window is divided between characters.

    Args:
        text: The document.
        size: Maximum bytes of a window in UTF-8.

    >>> [window.text for window in cut_windows("one two three", 8)]
    ['one two', ' three']
    >>> [window.num_words for window in cut_windows("abcdefgh", 5)]
    [1, 0]
    """
    content = text.encode()
    start, is_in_word = 0, False
    while start < len(content):
        end = find_end(content, start, size)
        part = content[start:end].decode()
        begins_inside = is_in_word and not part[0].isspace()
        yield Window(part, end - start, len(part.split()) - begins_inside)
        is_in_word = not part[-1].isspace()
        start = end


def find_end(content: bytes, start: int, size: int) -> int:
    """Returns the end of the window that begins at a position of a text in UTF-8."""
    limit = start + size
    if limit >= len(content):
        return len(content)
    # The byte at the limit may be the space that begins the next window.
    space = max(content.rfind(space, start + 1, limit + 1) for space in SPACES)
    if space > start:
        return space
    while limit > start + 1 and content[limit] & 0xC0 == 0x80:  # within a character
        limit -= 1
    return limit


def find_context(content: bytes, end: int, size: int) -> int:
    """Returns the start of the context before a position of a text in UTF-8, which begins at white space.

    Args:
        content: The text.
        end: The position.
        size: Maximum bytes of the context.

    >>> find_context(b"one two three", 7, 5), find_context(b"one two three", 7, 2)
    (3, 5)
    """
    start = end - size
    if start <= 0:
        return 0
    spaces = [position for space in SPACES if (position := content.find(space, start, end)) >= 0]
    if spaces:
        return min(spaces)
    while start < end and content[start] & 0xC0 == 0x80:  # within a character
        start += 1
    return start
