"""Splits texts into passages: by a number of words or tokens, with overlap, at sentences or paragraphs.

A character of a script without spaces between words, such as Chinese or Thai, counts as a word.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_softprompt.core.word_boundaries import CLAUSE_SPACED, word_spans

Span = tuple[int, int]  # start and end position
Units = Callable[[str], list[Span]]  # spans of the words or tokens of a text
Whole = Literal["sentences", "paragraphs", "nothing"]

PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
SENTENCE = re.compile(
    r"[.!?…؟۔।॥։።]+[\"'”’)\]]*\s+(?=[^\s\W]|[\"'“‘(\[])"  # noqa: RUF001
    r"|[。！？｡][\"'”’」』）]*|[។။།]+"  # noqa: RUF001
    rf"|(?<=[{CLAUSE_SPACED}])\s+(?=\S)|\n"
)


def find_words(text: str) -> list[Span]:
    """Returns the spans of words, which white space separates, and of characters of scripts without spaces.

    >>> find_words("a warm  film"), find_words("你好。再见")
    ([(0, 1), (2, 6), (8, 12)], [(0, 1), (1, 3), (3, 4), (4, 5)])
    """
    return word_spans(text)


@dataclass(frozen=True)
class Chunking:
    """Settings for splitting texts.

    The passages cover the text. A passage ends at the last end of a paragraph or sentence within its size, and starts
    with as many complete sentences of the previous passage as the overlap allows. A sentence that is longer than a
    passage is split between words.

    Args:
        size: Maximum words or tokens of a passage.
        overlap: Maximum words or tokens that it shares with the previous passage.
        whole: Unit that is not split if it fits into a passage.
        units: Returns the spans of words or tokens.

    Raises:
        ValueError: If overlap is not less than size.
    """

    size: int = 200
    overlap: int = 40
    whole: Whole = "sentences"
    units: Units = find_words

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"overlap must be at least 0 and below size={self.size}, got {self.overlap}")

    def spans(self, text: str) -> list[Span]:
        """Returns the spans of the passages of a text; none for a text without words.

        >>> Chunking(size=3, overlap=1, whole="nothing").spans("a b c d e")
        [(0, 6), (4, 9)]
        """
        starts = [start for start, _ in self.units(text)]
        spans = [(starts[first], end) for first, end in self._pieces(text, starts)]
        if not spans:
            return []
        return [(0, spans[0][1]), *spans[1:]]  # the first passage includes leading white space

    def _pieces(self, text: str, starts: Sequence[int]) -> list[Span]:
        """Returns the first unit and the end position of each passage."""
        breaks = [_units_at(starts, positions) for positions in _break_positions(text, self.whole)]
        pieces: list[Span] = []
        first = end = 0
        while end < len(starts):
            end = self._end(first, end, len(starts), breaks)
            pieces.append((first, starts[end] if end < len(starts) else len(text)))
            first = self._next(first, end, breaks)
        return pieces

    def _end(self, first: int, before: int, total: int, breaks: Sequence[Sequence[int]]) -> int:
        """Returns the unit after a passage: the last break of the best kind within reach, if it is after `before`."""
        reach = first + self.size
        if reach >= total:
            return total
        for kind in breaks:
            at = bisect_right(kind, reach)
            if at and kind[at - 1] > before:
                return kind[at - 1]
        return reach

    def _next(self, first: int, end: int, breaks: Sequence[Sequence[int]]) -> int:
        """Returns the first unit of the next passage: the start of a sentence if there is one in the overlap."""
        earliest = max(first + 1, end - self.overlap)
        ends = breaks[-1] if breaks else ()
        at = bisect_left(ends, earliest)
        return ends[at] if at < len(ends) and ends[at] <= end else earliest


def _break_positions(text: str, whole: Whole) -> list[list[int]]:
    """Returns the positions at which a text can be split, the best kind first."""
    if whole == "nothing":
        return []
    sentences = [match.end() for match in SENTENCE.finditer(text)]
    if whole == "sentences":
        return [sentences]
    return [[match.end() for match in PARAGRAPH.finditer(text)], sentences]


def _units_at(starts: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Returns the first unit at or after each position."""
    return [bisect_left(starts, position) for position in positions]
