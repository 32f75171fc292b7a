"""The words of a corpus that cost the most tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.vocabulary.word_counts import WordCounts


@dataclass(frozen=True)
class WordCost:
    """A word that a tokenizer divides or does not know.

    Args:
        text: The word.
        count: Occurrences in the corpus.
        tokens: Tokens of an occurrence.
        is_unknown: Whether one of them is the unknown token.
    """

    text: str
    count: int
    tokens: int
    is_unknown: bool

    @property
    def extra_tokens(self) -> int:
        """Tokens that the corpus would save if the word were one token."""
        return self.count * (self.tokens - 1)


@dataclass(frozen=True)
class WordCosts:
    """Costs of the words of a corpus.

    Args:
        words: Divided or unknown words: those that cost most extra tokens first, then the most frequent ones.
        by_tokens: Occurrences of words with each number of tokens.
    """

    words: tuple[WordCost, ...]
    by_tokens: Counter[int]


def measure_words(counts: WordCounts, tokenizer: Any) -> WordCosts:
    """Returns the costs of the words of a corpus under the tokenizer that they were counted with.

    Args:
        counts: Words in the form that the model of the tokenizer reads, see `count_words`.
        tokenizer: A fast tokenizer of transformers.
    """
    model, decoder = tokenizer.backend_tokenizer.model, tokenizer.backend_tokenizer.decoder
    by_tokens: Counter[int] = Counter()
    costs: list[WordCost] = []
    for word, count in counts.counts.items():
        ids = [token.id for token in model.tokenize(word)]
        by_tokens[len(ids)] += count
        is_unknown = tokenizer.unk_token_id in ids
        if len(ids) > 1 or is_unknown:
            text = word if decoder is None else decoder.decode([word])
            costs.append(WordCost(text.replace("▁", " ").strip(), count, len(ids), is_unknown))
    costs.sort(key=lambda cost: (-cost.extra_tokens, -cost.count, cost.text))
    return WordCosts(tuple(costs), by_tokens)
