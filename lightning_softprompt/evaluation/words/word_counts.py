"""How often words occur in a corpus, and the classes of words that are equally frequent."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

FREQUENCIES = ("0", "1-4", "5-19", "20-99", "100+")  # occurrences of a word
FIRST_COUNTS = (1, 5, 20, 100)  # of each class after the first
AROUND_WORD = re.compile(r"^\W+|\W+$")


def frequency_of(count: int) -> int:
    """Returns the index in `FREQUENCIES` of a number of occurrences.

    >>> [FREQUENCIES[frequency_of(count)] for count in (0, 4, 5, 1000)]
    ['0', '1-4', '5-19', '100+']
    """
    return bisect_right(FIRST_COUNTS, count)


def strip_punctuation(word: str) -> str:
    """Returns a word without the punctuation around it; punctuation alone is a word.

    >>> strip_punctuation("(Heart-rate),"), strip_punctuation("--")
    ('Heart-rate', '--')
    """
    return AROUND_WORD.sub("", word) or word


@lru_cache(maxsize=100_000)
def normalize_word(word: str) -> str:
    """Returns a word in lower case, without the punctuation around it.

    >>> normalize_word("(Heart-rate),")
    'heart-rate'
    """
    return strip_punctuation(word).casefold()


def count_words(texts: Iterable[str], normalize: Callable[[str], str] = normalize_word) -> Counter[str]:
    """Counts the words of texts, which white space separates.

    Args:
        texts: The texts.
        normalize: Returns the form in which a word is counted.

    >>> count_words(["A dog.", "the Dog"])["dog"]
    2
    """
    written: Counter[str] = Counter()
    for text in texts:
        written.update(text.split())
    counts: Counter[str] = Counter()
    for word, count in written.items():
        counts[normalize(word)] += count
    return counts
