"""Adds tokens to a copy of a tokenizer: merges of a byte-pair encoding, or whole words of a word list."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from tokenizers import Tokenizer

from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.vocabulary.merges import Pair, apply_merges, continue_merges
from lightning_softprompt.vocabulary.word_counts import WordCounts, is_letters, split_words

Unit = Literal["auto", "pieces", "words"]


@dataclass(frozen=True)
class Selection:
    """Which words of a corpus may become tokens.

    Args:
        rows: Maximum number of new tokens.
        min_count: Minimum occurrences of a word.
        min_documents: Minimum documents that contain a word.
        unit: `pieces` adds the most frequent pieces of words, `words` adds whole words; `auto` adds pieces if the
            tokenizer is a byte-pair encoding.
    """

    rows: int = 500
    min_count: int = 8
    min_documents: int = 4
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
        self.vocabulary: dict[str, int] = dict(self.rules["model"]["vocab"])
        self.rows: list[AddedRow] = []
        self._bases: dict[str, tuple[int, ...]] = {}
        all_ids = tokenizer.get_vocab().values()
        self.first_id = max(all_ids) + 1

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
            if len(words) != 1:
                skipped[term] = f"the tokenizer divides it into {len(words)} words"
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
        self.rules["model"]["vocab"][token] = row.id
        self._bases[token] = row.base


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
        words = select_words(self, counts, general, selection)
        if selection.unit == "words":
            for word in words:
                self.add_word(word, counts.counts[word], selection.rows - len(self.rows))
            return
        tokens: dict[tuple[str, ...], int] = {}
        for word in words:
            key = tuple(self.tokens_of(word))
            tokens[key] = tokens.get(key, 0) + counts.counts[word]
        merges = continue_merges(tokens, self.vocabulary, selection.rows)
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
        for word in select_words(self, counts, general, selection)[: selection.rows]:
            self.add_word(word, counts.counts[word], 1)

    def add_word(self, word: str, count: int, limit: int) -> str | None:
        """See `Extension.add_word`."""
        if word in self._bases:
            return "it is a new token already"
        if limit < 1:
            return "it requires more new tokens than --rows allows"
        base = [self.base_ids(token)[0] for token in self.tokens_of(word)]
        self._add_row(word, word, base, count)
        return None


EXTENSIONS: tuple[type[Extension], ...] = (MergeExtension, WordExtension)


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
    raise ValueError(
        f"a {kind} tokenizer cannot be extended, since its tokens require probabilities of a joint training; "
        f"supported types are {supported}"
    )


def select_words(
    extension: Extension, counts: WordCounts, general: WordCounts | None, selection: Selection
) -> list[str]:
    """Returns the words of a corpus that are specific to it and have several tokens, the most rewarding first.

    A word is specific if its term p log(p / q) of the Kullback-Leibler divergence between the corpus, p, and a general
    text, q, is positive (Sachidananda et al. 2021, arXiv 2109.07460). The reward is that term times the number of
    tokens that a single token for the word saves.

    Args:
        extension: The tokenizer.
        counts: Words of the corpus.
        general: Words of a general text; None to take every word as specific.
        selection: Minimum counts.
    """
    rewards: dict[str, float] = {}
    for word, count in counts.counts.items():
        if count < selection.min_count or counts.documents[word] < selection.min_documents:
            continue
        tokens = extension.tokens_of(word)
        is_one_token = len(tokens) == 1 and not extension.has_unknown(word)
        if is_one_token or not is_letters(_text_of(extension, word)):
            continue
        share = counts.share(word)
        divergence = share if general is None else share * math.log(share / general.share(word))
        if divergence > 0:
            rewards[word] = divergence * max(1, len(tokens) - 1)
    return sorted(rewards, key=lambda word: (-rewards[word], word))


def _text_of(extension: Extension, word: str) -> str:
    """Returns the text of a word without the space before it."""
    decoder = extension.tokenizer.backend_tokenizer.decoder
    text: str = word if decoder is None else decoder.decode([word])
    return text.replace("▁", " ").strip()


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
