"""The words that lexical search compares: lower case, word stems, no accents."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache

from lightning_softprompt.core.word_boundaries import words_with_neighbors

NONE = "none"
# Marks that a searcher may leave out: accents, and the vowel marks of Hebrew and Arabic. Those of other scripts, such
# as the vowels of Hindi and Thai or the voicing marks of Japanese, make another word.
OPTIONAL_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed"
    "\u08ca-\u08ff\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
)
INVISIBLE = re.compile("[\u00ad\u0640\u200c-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")  # inside words


def languages() -> list[str]:
    """The languages whose stems are known, and `none`."""
    from nltk.stem.snowball import SnowballStemmer

    return [NONE, *sorted(set(SnowballStemmer.languages) - {"porter"})]


def words(text: str, language: str) -> list[str]:
    """The words of a text by their stems (Snowball, as nltk has it), without accents.

    A script without spaces between words gives its characters and pairs of neighboring characters, as Lucene's
    `CJKBigramFilter` does. Forms that are compatible in Unicode, such as full-width digits, are the same.

    >>> words("Acadêmicos, 2 films!", "none"), words("東京都", "none")
    (['academicos', '2', 'films'], ['東', '東京', '京', '京都', '都'])

    Raises:
        ValueError: If the language is not known.
    """
    stem = stemmer(language)
    plain_text = text if text.isascii() else INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return [stem(word) for word in words_with_neighbors(plain_text.lower())]


@cache
def stemmer(language: str) -> Callable[[str], str]:
    """A function from a word to its stem, which is computed once for each word."""
    if language == NONE:
        return lru_cache(maxsize=2**18)(plain)
    if language not in languages():
        raise ValueError(f"no stems of {language!r} are known; known: {', '.join(languages())}")
    from nltk.stem.snowball import SnowballStemmer

    snowball = SnowballStemmer(language)
    return lru_cache(maxsize=2**18)(lambda word: plain(snowball.stem(word)))


def plain(word: str) -> str:
    """A word without its accents and the vowel marks of Hebrew and Arabic.

    >>> plain("não"), plain("हिन्दी")
    ('nao', 'हिन्दी')
    """
    bare = OPTIONAL_MARKS.sub("", unicodedata.normalize("NFD", word))
    return unicodedata.normalize("NFC", bare) or word
