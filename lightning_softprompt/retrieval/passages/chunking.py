"""Where a text is cut into passages: by a number of words or tokens, with overlap, at sentences or paragraphs.

A character of a script without spaces between words, such as Chinese or Thai, counts as a word.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_softprompt.core.word_boundaries import CLAUSE_SPACED, word_spans

Span = tuple[int, int]  # first character, and the one behind the last
Units = Callable[[str], list[Span]]  # where the words or tokens of a text stand
Whole = Literal["sentences", "paragraphs", "nothing"]

PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
SENTENCE = re.compile(
    r"[.!?…؟۔।॥։።]+[\"'”’)\]]*\s+(?=[^\s\W]|[\"'“‘(\[])"  # noqa: RUF001
    r"|[。！？｡][\"'”’」』）]*|[។။།]+"  # noqa: RUF001
    rf"|(?<=[{CLAUSE_SPACED}])\s+(?=\S)|\n"
)


def find_words(text: str) -> list[Span]:
    """Where the words of a text are: what white space separates, and the characters of scripts without spaces.

    >>> find_words("a warm  film"), find_words("你好。再见")
    ([(0, 1), (2, 6), (8, 12)], [(0, 1), (1, 3), (3, 4), (4, 5)])
    """
    return word_spans(text)


@dataclass(frozen=True)
class Chunking:
    """How texts are cut.

    Each character is in some passage. A passage ends at the last end of a paragraph or sentence that it reaches, and
    begins with whole ones of the passage before, as many as the overlap holds; what is longer than a passage is cut
    between words.

    Args:
        size: Words or tokens of a passage, at most.
        overlap: How many of them it may share with the passage before.
        whole: What is kept whole where it fits.
        units: Where words or tokens stand.

    Raises:
        ValueError: If passages would not get on.
    """

    size: int = 200
    overlap: int = 40
    whole: Whole = "sentences"
    units: Units = find_words

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"passages of {self.size} with an overlap of {self.overlap} do not get on; wanted 0 <= overlap < size"
            )

    def spans(self, text: str) -> list[Span]:
        """Where the passages of a text stand; none of a text without words.

        >>> Chunking(size=3, overlap=1, whole="nothing").spans("a b c d e")
        [(0, 6), (4, 9)]
        """
        starts = [start for start, _ in self.units(text)]
        found = [(starts[first], end) for first, end in self._pieces(text, starts)]
        return [(0, found[0][1]), *found[1:]] if found else []

    def _pieces(self, text: str, starts: Sequence[int]) -> list[Span]:
        """First unit and last character of each passage."""
        breaks = [_units_at(starts, places) for places in _places(text, self.whole)]
        pieces: list[Span] = []
        first = end = 0
        while end < len(starts):
            end = self._end(first, end, len(starts), breaks)
            pieces.append((first, starts[end] if end < len(starts) else len(text)))
            first = self._next(first, end, breaks)
        return pieces

    def _end(self, first: int, before: int, total: int, breaks: Sequence[Sequence[int]]) -> int:
        """The unit behind a passage: the furthest break of the best kind that is in reach and gets on."""
        reach = first + self.size
        if reach >= total:
            return total
        for kind in breaks:
            at = bisect_right(kind, reach)
            if at and kind[at - 1] > before:
                return kind[at - 1]
        return reach

    def _next(self, first: int, end: int, breaks: Sequence[Sequence[int]]) -> int:
        """The first unit of the next passage: of a sentence, unless the one before was cut within one."""
        earliest = max(first + 1, end - self.overlap)
        ends = breaks[-1] if breaks else ()
        at = bisect_left(ends, earliest)
        return ends[at] if at < len(ends) and ends[at] <= end else earliest


def _places(text: str, whole: Whole) -> list[list[int]]:
    """Characters at which a text may be cut, the best kind first."""
    if whole == "nothing":
        return []
    sentences = [found.end() for found in SENTENCE.finditer(text)]
    if whole == "sentences":
        return [sentences]
    return [[found.end() for found in PARAGRAPH.finditer(text)], sentences]


def _units_at(starts: Sequence[int], places: Sequence[int]) -> list[int]:
    """The unit that each place stands before."""
    return [bisect_left(starts, place) for place in places]
