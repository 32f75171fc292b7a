r"""Word boundaries in every script: where words begin without spaces, and which marks belong to a letter.

Text in Latin, Greek, Cyrillic or Hangul is split as the regular expression `\w+` splits it. In addition, a combining
mark belongs to the letter before it, and each character of a script that writes no spaces between words is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

Spans = list[tuple[int, int]]

IDEOGRAPHS = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# The first and last code point of Thai to Tibetan, Myanmar, Khmer, Tai Le, Tai Tham, Balinese, kana, Yi and others
UNSPACED_BLOCKS = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F),
    (0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0xA000, 0xA4CF), (0xA980, 0xA9DF), (0xA9E0, 0xA9FF),
    (0xAA60, 0xAADF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F),
)  # fmt: skip
LAST_WITH_MARKS = 0x1FFFF  # planes above hold ideographs and variation selectors
JOINERS = "\u200c\u200d"  # they join letters of Persian and of Indic scripts within a word
VARIATION_SELECTORS = "\U000e0100-\U000e01ef"
CLAUSE_SPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer: a space ends a clause


def split_words(text: str) -> list[str]:
    """Returns the words of a text.

    >>> split_words("Don't stop, Zoë! फ्रांस की 首都 GPT4")
    ['Don', 't', 'stop', 'Zoë', 'फ्रांस', 'की', '首', '都', 'GPT4']
    """
    return re.findall(r"\w+", text) if text.isascii() else _word().findall(text)


def split_unspaced(word: str) -> list[str]:
    """Returns the words of a text without white space: single characters of scripts without spaces, else the text.

    >>> split_unspaced("iPhone手机"), split_unspaced("it's")
    (['iPhone', '手', '机'], ["it's"])
    """
    return [word] if word.isascii() else _letter_or_rest().findall(word)


def words_with_neighbors(text: str) -> list[str]:
    """Returns the words of a text and, for scripts without spaces, pairs of characters in place of longer words.

    >>> words_with_neighbors("on 東京都")
    ['on', '東', '東京', '京', '京都', '都']
    """
    if text.isascii():
        return split_words(text)
    letter = _letter_without_spaces()
    words: list[str] = []
    last, last_end = "", -1
    for match in _word().finditer(text):
        word = match.group()
        are_adjacent = last_end == match.start()
        if are_adjacent and letter.match(last) and letter.match(word):
            words.append(last + word)
        words.append(word)
        last, last_end = word, match.end()
    return words


def word_spans(text: str) -> Spans:
    """Returns start and end of the words of a text, including adjacent punctuation.

    >>> word_spans("a warm  film"), word_spans("你好。再见")
    ([(0, 1), (2, 6), (8, 12)], [(0, 1), (1, 3), (3, 4), (4, 5)])
    """
    pattern = re.compile(r"\S+") if text.isascii() else _unit()
    return [found.span() for found in pattern.finditer(text)]


@cache
def letters_without_spaces() -> str:
    """The letters of scripts without spaces between words, as the inside of a regular expression's class."""
    codes = (code for first, last in UNSPACED_BLOCKS for code in range(first, last + 1))
    return IDEOGRAPHS + _ranges(code for code in codes if unicodedata.category(chr(code)) in ("Lo", "Lm"))


@cache
def marks() -> str:
    """All combining marks, as the inside of a regular expression's class."""
    found = (code for code in range(LAST_WITH_MARKS + 1) if unicodedata.category(chr(code))[0] == "M")
    return _ranges(found) + VARIATION_SELECTORS


@cache
def _letter_without_spaces() -> re.Pattern[str]:
    return re.compile(f"[{letters_without_spaces()}]")


@cache
def _word() -> re.Pattern[str]:
    letter, mark = letters_without_spaces(), marks()
    return re.compile(rf"[{letter}][{mark}]*|[^\W{letter}](?:[^\W{letter}]|[{mark}{JOINERS}])*")


@cache
def _letter_or_rest() -> re.Pattern[str]:
    letter, mark = letters_without_spaces(), marks()
    return re.compile(rf"[{letter}][{mark}]*|[^{letter}]+")


@cache
def _unit() -> re.Pattern[str]:
    letter = letters_without_spaces()
    opening = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Ps", "Pi"))
    return re.compile(rf"[{letter}][^\w\s{re.escape(opening)}]*|[^\s{letter}]+")


def _ranges(codes: Iterable[int]) -> str:
    """Code points in order, as ranges of a regular expression's class."""
    ordered = list(codes)
    gaps = [(before, after) for before, after in pairwise(ordered) if after != before + 1]
    starts = [ordered[0], *(after for _, after in gaps)]
    ends = [*(before for before, _ in gaps), ordered[-1]]
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in zip(starts, ends, strict=True))
