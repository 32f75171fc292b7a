"""`Extension`: a copy of a tokenizer to which words of a corpus are added, and how these words are selected."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.vocabulary.word_counts import MAX_LENGTH, WordCounts, is_letters, is_symbols, split_words

MIN_DOCUMENTS = 4  # that contain a word which becomes a token
Unit = Literal["auto", "pieces", "words"]


@dataclass(frozen=True)
class Selection:
    """Which words of a corpus may become tokens.

    Args:
        rows: Maximum number of new tokens.
        min_count: Minimum occurrences of a word, or of a piece in all words.
        min_documents: Minimum documents that contain a word (default: 4 for whole words, and 1 for pieces, which occur
            in several words).
        unit: `pieces` adds the most frequent pieces of words, `words` adds whole words; `auto` adds pieces if the
            tokenizer is a byte-pair encoding.
    """

    rows: int = 500
    min_count: int = 8
    min_documents: int | None = None
    unit: Unit = "auto"


class Extension(ABC):
    """A copy of a tokenizer to which tokens are added. Existing tokens keep their ids.

    Args:
        tokenizer: The fast tokenizer of transformers to extend; it is not changed.
    """

    model_types: tuple[str, ...]  # types of the tokenizer's model that the class extends

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.rules = json.loads(tokenizer.backend_tokenizer.to_str())
        self.vocabulary: dict[str, int] = self._read_vocabulary()
        self.rows: list[AddedRow] = []
        self._bases: dict[str, tuple[int, ...]] = {}
        all_ids = tokenizer.get_vocab().values()
        self.first_id = max(all_ids) + 1

    def _read_vocabulary(self) -> dict[str, int]:
        """Returns the ids of the tokens of the tokenizer's model."""
        return dict(self.rules["model"]["vocab"])

    @abstractmethod
    def select(self, counts: WordCounts, general: WordCounts | None, selection: Selection) -> None:
        """Adds tokens for the words of a corpus."""

    @abstractmethod
    def add_word(self, word: str, count: int, limit: int) -> str | None:
        """Adds a whole word, in the form of `split_words`.

        Args:
            word: The word.
            count: How often it occurs.
            limit: Maximum number of new tokens for it.

        Returns:
            The reason if it cannot be added; None if it was added.
        """

    def add_terms(self, terms: Iterable[str], counts: WordCounts | None, limit: int) -> dict[str, str]:
        """Adds a list of terms, each as a word within a text.

        Returns:
            The reason for each term that was skipped.
        """
        skipped: dict[str, str] = {}
        for term in terms:
            words = split_words(self.tokenizer, f"a {term}")[1:]
            word = "".join(words)
            if not words:
                skipped[term] = "the tokenizer removes all its characters"
            elif len(words) > 1:
                skipped[term] = f"the tokenizer divides it into {len(words)} words"
            elif len(word) > MAX_LENGTH:
                skipped[term] = f"it is longer than {MAX_LENGTH} characters"
            elif len(self.tokens_of(word)) == 1 and not self.has_unknown(word):
                skipped[term] = "it is one token already"
            else:
                count = 0 if counts is None else counts.counts[word]
                reason = self.add_word(word, count, limit - len(self.rows))
                if reason is not None:
                    skipped[term] = reason
        return skipped

    def extended(self) -> Any:
        """Returns the extended tokenizer."""
        tokenizer = deepcopy(self.tokenizer)
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(self.rules))
        return tokenizer

    def tokens_of(self, word: str) -> list[str]:
        """Returns the tokens of a word, with the tokens that were added so far."""
        model = self.tokenizer.backend_tokenizer.model
        return [token.value for token in model.tokenize(word)]

    def has_unknown(self, word: str) -> bool:
        """Whether the base tokenizer lacks tokens for a word."""
        return self.tokenizer.unk_token is not None and self.tokenizer.unk_token in self.tokens_of(word)

    def base_ids(self, token: str) -> tuple[int, ...]:
        """Returns the ids of a token in the base tokenizer, or of the base tokens that an added token consists of."""
        return self._bases[token] if token in self._bases else (self.vocabulary[token],)

    def _add_row(self, token: str, text: str, base: Sequence[int], count: int) -> None:
        row = AddedRow(self.first_id + len(self.rows), token, text, tuple(base), count)
        self.rows.append(row)
        self._bases[token] = row.base
        self._write_token(row)

    def _write_token(self, row: AddedRow) -> None:
        """Adds a token to the vocabulary in the rules of the tokenizer."""
        self.rules["model"]["vocab"][row.token] = row.id


def select_words(
    extension: Extension,
    counts: WordCounts,
    general: WordCounts | None,
    min_count: int,
    min_documents: int | None = None,
) -> list[str]:
    """Returns the words of a corpus that are specific to it and have several tokens, the most rewarding first.

    A word is specific if its term p log(p / q) of the Kullback-Leibler divergence between the corpus, p, and a general
    text, q, is positive (Sachidananda et al. 2021, arXiv 2109.07460). The reward is that term times the number of
    tokens that a single token for the word saves. Words with unknown tokens come first, since the model cannot tell
    them apart.

    Args:
        extension: The tokenizer.
        counts: Words of the corpus.
        general: Words of a general text; None to take every word as specific.
        min_count: Minimum occurrences of a word.
        min_documents: Minimum documents that contain a word (default: `MIN_DOCUMENTS`).
    """
    if min_documents is None:
        min_documents = MIN_DOCUMENTS
    rewards: dict[str, float] = {}
    for word, count in counts.counts.items():
        if count < min_count or counts.documents[word] < min_documents:
            continue
        tokens, is_unknown = extension.tokens_of(word), extension.has_unknown(word)
        is_one_token = len(tokens) == 1 and not is_unknown
        text = _text_of(extension, word)
        may_be_added = is_letters(text) or (is_unknown and is_symbols(text))
        if is_one_token or not may_be_added:
            continue
        share = counts.share(word)
        divergence = share if general is None else share * math.log(share / general.share(word))
        if divergence > 0:
            rewards[word] = divergence * max(1, len(tokens) - 1)
    return sorted(rewards, key=lambda word: (not extension.has_unknown(word), -rewards[word], word))


def _text_of(extension: Extension, word: str) -> str:
    """Returns the text of a word without the space before it."""
    decoder = extension.tokenizer.backend_tokenizer.decoder
    text: str = word if decoder is None else decoder.decode([word])
    return text.replace("▁", " ").strip()
