"""The words that lexical search goes by: small letters, word stems, no accents."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache

WORD = re.compile(r"\w+")
NONE = "none"


def languages() -> list[str]:
    """The languages whose stems are known, and `none`."""
    from nltk.stem.snowball import SnowballStemmer

    return [NONE, *sorted(set(SnowballStemmer.languages) - {"porter"})]


def words(text: str, language: str) -> list[str]:
    """The words of a text by their stems (Snowball, as nltk has it), accents taken off.

    >>> words("Acadêmicos, 2 films!", "none")
    ['academicos', '2', 'films']

    Raises:
        ValueError: If the language is not known.
    """
    stem = stemmer(language)
    return [stem(word) for word in WORD.findall(unicodedata.normalize("NFC", text).lower())]


@cache
def stemmer(language: str) -> Callable[[str], str]:
    """A function from a word to its stem, which is made once for each word."""
    if language == NONE:
        return lru_cache(maxsize=2**18)(plain)
    if language not in languages():
        raise ValueError(f"no stems of {language!r} are known; known: {', '.join(languages())}")
    from nltk.stem.snowball import SnowballStemmer

    snowball = SnowballStemmer(language)
    return lru_cache(maxsize=2**18)(lambda word: plain(snowball.stem(word)))


def plain(word: str) -> str:
    """A word without its accents.

    >>> plain("não")
    'nao'
    """
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c)) or word
