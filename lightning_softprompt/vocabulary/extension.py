"""Adds tokens to tokenizers: merges to byte-pair encodings, whole words to word lists and unigram models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_softprompt.vocabulary.base import Extension, Selection, select_words
from lightning_softprompt.vocabulary.merges import Pair, apply_merges, continue_merges
from lightning_softprompt.vocabulary.unigram import UnigramExtension
from lightning_softprompt.vocabulary.word_counts import WordCounts


class MergeExtension(Extension):
    """Adds merges to a byte-pair encoding, after all existing ones.

    Text without a new pair of tokens is tokenized as before.

    Args:
        tokenizer: The tokenizer to extend.
    """

    model_types = ("BPE",)

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._ranks: dict[Pair, int] = {}  # of the new merges

    def select(self, counts: WordCounts, general: WordCounts | None, selection: Selection) -> None:
        """See `Extension.select`. Pieces are merged as in training, within the selected words."""
        if selection.unit == "words":
            words = select_words(self, counts, general, selection.min_count, selection.min_documents)
            for word in words:
                self.add_word(word, counts.counts[word], selection.rows - len(self.rows))
            return
        words = select_words(self, counts, general, 1, selection.min_documents or 1)  # rare words share frequent pieces
        tokens: dict[tuple[str, ...], int] = {}
        for word in words:
            *_, (_, key) = apply_merges(self.tokens_of(word), self._ranks)
            tokens[tuple(key)] = tokens.get(tuple(key), 0) + counts.counts[word]
        existing = self.vocabulary.keys() | self._bases.keys()
        min_count = max(2, selection.min_count)
        merges = continue_merges(tokens, existing, selection.rows - len(self.rows), min_count)
        for pair, count in zip(merges, _count_merges(tokens, merges), strict=True):
            self._add_merge(pair, count)

    def add_word(self, word: str, count: int, limit: int) -> str | None:
        """See `Extension.add_word`. The tokens of the word are merged from left to right, or from right to left."""
        *_, (_, tokens) = apply_merges(self.tokens_of(word), self._ranks)
        if len(tokens) == 1:
            return "it is a new token already"
        if len(tokens) - 1 > limit:
            return f"it requires {len(tokens) - 1} new tokens, more than --rows allows"
        existing = self.vocabulary.keys() | self._bases.keys()
        for pairs in (_pairs_from_left(tokens), _pairs_from_right(tokens)):
            if not any("".join(pair) in existing for pair in pairs):
                for pair in pairs:
                    self._add_merge(pair, count)
                return None
        return "a part of it is a token that the tokenizer does not use there"

    def _add_merge(self, pair: Pair, count: int) -> None:
        merges = self.rules["model"]["merges"]
        is_text = bool(merges) and isinstance(merges[0], str)
        merges.append(" ".join(pair) if is_text else list(pair))
        self._ranks[pair] = len(self._ranks)
        base = [*self.base_ids(pair[0]), *self.base_ids(pair[1])]
        self._add_row("".join(pair), self.tokenizer.decode(base), base, count)


def _pairs_from_left(tokens: Sequence[str]) -> list[Pair]:
    return [("".join(tokens[:end]), tokens[end]) for end in range(1, len(tokens))]


def _pairs_from_right(tokens: Sequence[str]) -> list[Pair]:
    ends = ["".join(tokens[start:]) for start in range(1, len(tokens))]
    pairs = list(zip(tokens, ends, strict=False))
    return pairs[::-1]


class WordExtension(Extension):
    """Adds whole words to a tokenizer that looks words up: WordPiece, or a list of words.

    Args:
        tokenizer: The tokenizer to extend.
    """

    model_types = ("WordPiece", "WordLevel")

    def select(self, counts: WordCounts, general: WordCounts | None, selection: Selection) -> None:
        """See `Extension.select`."""
        if selection.unit == "pieces":
            raise ValueError(f"a {self.rules['model']['type']} tokenizer has no merges; set --unit words")
        for word in select_words(self, counts, general, selection.min_count, selection.min_documents):
            self.add_word(word, counts.counts[word], selection.rows - len(self.rows))

    def add_word(self, word: str, count: int, limit: int) -> str | None:
        """See `Extension.add_word`."""
        if word in self._bases:
            return "it is a new token already"
        if limit < 1:
            return "it requires more new tokens than --rows allows"
        base = [self.base_ids(token)[0] for token in self.tokens_of(word)]
        self._add_row(word, word, base, count)
        return None


EXTENSIONS: tuple[type[Extension], ...] = (MergeExtension, WordExtension, UnigramExtension)


def create_extension(tokenizer: Any) -> Extension:
    """Creates the extension of a tokenizer.

    Raises:
        ValueError: If no class extends tokenizers of its type.
    """
    kind = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    for cls in EXTENSIONS:
        if kind in cls.model_types:
            return cls(tokenizer)
    supported = ", ".join(name for cls in EXTENSIONS for name in cls.model_types)
    raise ValueError(f"a {kind} tokenizer cannot be extended; supported types are {supported}")


def _count_merges(words: Mapping[tuple[str, ...], int], merges: Sequence[Pair]) -> list[int]:
    """Returns how often each merge is applied in a corpus."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    applied = [0] * len(merges)
    for word, count in words.items():
        steps = list(apply_merges(word, ranks))
        for (_, before), (rank, after) in pairwise(steps):
            assert rank is not None
            applied[rank] += count * (len(before) - len(after))
    return applied
