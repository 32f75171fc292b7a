"""Rule-based sentence splitting, without models or downloaded word lists."""

from __future__ import annotations

import re
from itertools import pairwise

END = re.compile(r"[.!?…؟۔।॥։።]+[\"'”’)\]]*(?=\s)|[。！？｡។။]+[”’」』）]*")  # noqa: RUF001
OPENING = " \t\"'“‘(["  # noqa: RUF001
BEFORE_NAMES = frozenset("mr mrs ms dr prof st gen sen rep gov lt col sgt capt rev hon mt vs".split())  # noqa: SIM905


def sentences(text: str) -> list[str]:
    r"""Splits a text into sentences.

    A line break ends a sentence. So does a punctuation mark, unless a lower-case letter follows, or the word before a
    full stop is an initial (a capital letter, alone or after a capitalized word), a title, or `no` before a number.

    >>> sentences('Mr. J. Doe left. "Why?" he asked. Nobody\nknew')
    ['Mr. J. Doe left.', '"Why?" he asked.', 'Nobody', 'knew']
    """
    parts: list[str] = []
    for line in text.splitlines():
        ends = [mark.end() for mark in END.finditer(line) if _ends_sentence(line, mark)]
        for start, end in pairwise([0, *ends, len(line)]):
            parts.append(line[start:end].strip())
    return [sentence for sentence in parts if sentence]


def _ends_sentence(line: str, mark: re.Match[str]) -> bool:
    after = line[mark.end() :].lstrip(OPENING)[:1]
    if after.islower():
        return False
    if mark.group() != ".":
        return True
    *_, earlier, before = ["", *re.split(r"\W+", line[: mark.start()])]
    is_initial = len(before) == 1 and before.isupper() and (not earlier or earlier[0].isupper())
    is_number = before.lower() == "no" and after.isdigit()
    return not (is_initial or is_number or before.lower() in BEFORE_NAMES)


def lead(text: str, count: int) -> str:
    """Returns the first sentences of a text, a strong baseline for news summaries.

    >>> lead("One. Two. Three.", 2)
    'One. Two.'
    """
    return " ".join(sentences(text)[:count])
