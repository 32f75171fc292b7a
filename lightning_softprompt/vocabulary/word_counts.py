"""Counts the words of a corpus as the tokenizer divides it, in bounded memory."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning_softprompt.vocabulary.corpus_texts import Piece

MAX_WORDS = 1_000_000  # distinct words in memory
MAX_LENGTH = 64  # characters of a word that may become a token
SENTENCEPIECE_WORD = re.compile("▁?[^▁]+")


@dataclass
class WordCounts:
    """Counts of words, and of the documents that contain them.

    If there are more than `max_words` distinct words, the rarest ones are dropped. A count is then too low by at most
    `max_error`.

    Args:
        max_words: Maximum distinct words in memory.
    """

    max_words: int = MAX_WORDS
    counts: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    total: int = 0
    max_error: int = 0
    _last_document: dict[str, int] = field(default_factory=dict)

    def add(self, document: int, words: Iterable[str]) -> None:
        """Counts the words of a part of a document; the parts of a document follow each other."""
        part = Counter(words)
        self.total += part.total()
        for word, count in part.items():
            if len(word) > MAX_LENGTH:
                continue
            self.counts[word] += count
            if self._last_document.get(word) != document:
                self._last_document[word] = document
                self.documents[word] += 1
        while len(self.counts) > self.max_words:
            self._drop_rarest()

    def _drop_rarest(self) -> None:
        self.max_error += 1
        rare = [word for word, count in self.counts.items() if count <= self.max_error]
        for word in rare:
            del self.counts[word], self.documents[word], self._last_document[word]

    def share(self, word: str) -> float:
        """Relative frequency of a word, with one count added, so that it is above 0."""
        return (self.counts[word] + 1) / (self.total + 1)


def count_words(pieces: Iterable[Piece], tokenizer: Any, max_words: int = MAX_WORDS) -> WordCounts:
    """Counts the words of a corpus as the tokenizer divides it before its vocabulary is used.

    Args:
        pieces: The corpus.
        tokenizer: A fast tokenizer of transformers.
        max_words: Maximum distinct words in memory.
    """
    counts = WordCounts(max_words)
    for piece in pieces:
        counts.add(piece.document, split_words(tokenizer, piece.text))
    return counts


def split_words(tokenizer: Any, text: str) -> list[str]:
    """Returns the words of a text in the form that the model of the tokenizer reads."""
    rules = tokenizer.backend_tokenizer
    normalized = text if rules.normalizer is None else rules.normalizer.normalize_str(text)
    if rules.pre_tokenizer is None:  # SentencePiece: spaces are letters of the text
        return SENTENCEPIECE_WORD.findall(normalized)
    return [word for word, _ in rules.pre_tokenizer.pre_tokenize_str(normalized)]


def is_letters(text: str) -> bool:
    """Whether a text consists of letters and their marks.

    Tokenizers divide numbers and punctuation on purpose, so these do not become parts of new tokens.

    >>> is_letters("ação"), is_letters("B12"), is_letters("")
    (True, False, False)
    """
    return bool(text) and all(unicodedata.category(letter)[0] in "LM" for letter in text)


def is_symbols(text: str) -> bool:
    """Whether a text consists of symbols such as emojis, with their modifiers.

    >>> is_symbols("❤️"), is_symbols("=)"), is_symbols("")
    (True, False, False)
    """
    return bool(text) and all(unicodedata.category(character) in ("So", "Sk", "Mn", "Cf") for character in text)
