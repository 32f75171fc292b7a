"""Continues the training of a byte-pair encoding: the most frequent pairs of tokens become tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

Pair = tuple[str, str]


def continue_merges(
    words: Mapping[tuple[str, ...], int], vocabulary: Collection[str], limit: int, min_count: int = 2
) -> list[Pair]:
    """Returns the pairs that a byte-pair encoding merges next, most frequent first.

    Args:
        words: The count of each word, as its tokens.
        vocabulary: Existing tokens. A pair that joins to one of them is not merged, since the earlier merges that
            begin with this token would apply again.
        limit: Maximum number of pairs.
        min_count: Minimum occurrences of a pair when it is merged.

    >>> continue_merges({("a", "b", "c"): 3, ("a", "b"): 2}, {"a", "b", "c"}, 5)
    [('a', 'b'), ('ab', 'c')]
    """
    pairs = _PairCounts(words)
    merges: list[Pair] = []
    while len(merges) < limit:
        pair = pairs.pop_most_frequent(vocabulary, min_count)
        if pair is None:
            break
        merges.append(pair)
        pairs.merge(pair)
    return merges


class _PairCounts:
    """Counts of the pairs of neighboring tokens in words, updated as pairs are merged.

    Args:
        words: The count of each word, as its tokens.
    """

    def __init__(self, words: Mapping[tuple[str, ...], int]) -> None:
        self.tokens = [list(word) for word in words]
        self.word_counts = list(words.values())
        self.counts: Counter[Pair] = Counter()
        self.words_with: dict[Pair, set[int]] = defaultdict(set)
        for index in range(len(self.tokens)):
            self._count(index, self.counts)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapify(self.heap)

    def _count(self, index: int, counts: Counter[Pair]) -> None:
        """Adds the pairs of a word to counts, and remembers where they are."""
        for pair in pairwise(self.tokens[index]):
            counts[pair] += self.word_counts[index]
            self.words_with[pair].add(index)

    def pop_most_frequent(self, vocabulary: Collection[str], min_count: int) -> Pair | None:
        """Returns the most frequent pair that does not join to an existing token; None if no pair is frequent."""
        while self.heap:
            negative, pair = heappop(self.heap)
            is_outdated = self.counts[pair] != -negative
            if not is_outdated and "".join(pair) not in vocabulary:
                return pair if -negative >= min_count else None
        return None

    def merge(self, pair: Pair) -> None:
        """Merges a pair in all words."""
        changes: Counter[Pair] = Counter()
        for index in self.words_with.pop(pair):
            for old in pairwise(self.tokens[index]):
                changes[old] -= self.word_counts[index]
            self.tokens[index] = merge_pair(self.tokens[index], pair)
            self._count(index, changes)
        for changed, change in changes.items():
            self.counts[changed] += change
            if change and self.counts[changed] > 0:
                heappush(self.heap, (-self.counts[changed], changed))


def apply_merges(word: Sequence[str], ranks: Mapping[Pair, int]) -> Iterator[tuple[int | None, list[str]]]:
    """Yields the tokens of a word after each merge, with the rank of the merge; first, the word with None.

    >>> list(apply_merges(["a", "b", "c"], {("a", "b"): 0}))
    [(None, ['a', 'b', 'c']), (0, ['ab', 'c'])]
    """
    tokens = list(word)
    yield None, tokens
    while True:
        possible = [pair for pair in pairwise(tokens) if pair in ranks]
        if not possible:
            return
        pair = min(possible, key=ranks.__getitem__)
        tokens = merge_pair(tokens, pair)
        yield ranks[pair], tokens


def merge_pair(tokens: list[str], pair: Pair) -> list[str]:
    """Returns the tokens of a word with a pair merged, from left to right.

    >>> merge_pair(["a", "a", "a"], ("a", "a"))
    ['aa', 'a']
    """
    merged: list[str] = []
    position = 0
    while position < len(tokens):
        if tuple(tokens[position : position + 2]) == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(tokens[position])
            position += 1
    return merged
