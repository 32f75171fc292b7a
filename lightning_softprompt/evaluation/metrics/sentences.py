"""Where sentences end, by rules alone: no model and no word list has to be fetched."""

from __future__ import annotations

import re

END = re.compile(r"[.!?…؟۔।॥։።]+[\"'”’)\]]*(?=\s)|[。！？｡។။]+[”’」』）]*")  # noqa: RUF001
OPENING = " \t\"'“‘(["  # noqa: RUF001
BEFORE_NAMES = frozenset("mr mrs ms dr prof st gen sen rep gov lt col sgt capt rev hon mt vs".split())  # noqa: SIM905


def sentences(text: str) -> list[str]:
    r"""The sentences of a text.

    A line's end ends one; so does a mark, unless what follows begins small, or what stands before the full stop is an
    initial (one capital, alone or behind a capitalised word), a title, or `no` before a number.

    >>> sentences('Mr. J. Doe left. "Why?" he asked. Nobody\nknew')
    ['Mr. J. Doe left.', '"Why?" he asked.', 'Nobody', 'knew']
    """
    found: list[str] = []
    for line in text.splitlines():
        ends = [mark.end() for mark in END.finditer(line) if _ends(line, mark)]
        found += [line[a:b].strip() for a, b in zip([0, *ends], [*ends, len(line)], strict=True)]
    return [sentence for sentence in found if sentence]


def _ends(line: str, mark: re.Match[str]) -> bool:
    after = line[mark.end() :].lstrip(OPENING)[:1]
    if after.islower():
        return False
    if mark.group() != ".":
        return True
    *_, earlier, before = ["", *re.split(r"\W+", line[: mark.start()])]
    initial = len(before) == 1 and before.isupper() and (not earlier or earlier[0].isupper())
    return not initial and before.lower() not in BEFORE_NAMES and not (before.lower() == "no" and after.isdigit())


def lead(text: str, count: int) -> str:
    """The first sentences of a text, which news summaries are hard put to beat.

    >>> lead("One. Two. Three.", 2)
    'One. Two.'
    """
    return " ".join(sentences(text)[:count])
