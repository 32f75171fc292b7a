"""Where the words of a row that have classes begin among its tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_softprompt.types import IGNORE, Encoded, Label


def words_begun(tokens: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """For each token the numbers of the words of which it is the first; a token may span several, a word have none.

    Args:
        tokens: Where in the text each stands. A token may begin with the space before its word.
        words: Where in the text each stands.

    >>> words_begun([(0, 3), (3, 5), (5, 9)], [(0, 5), (6, 9)])
    [(0,), (), (1,)]
    """
    begun: list[tuple[int, ...]] = [()] * len(tokens)
    ends = [end for _, end in tokens]
    for number, (start, end) in enumerate(words):
        first = bisect_right(ends, start)  # the first token that goes on behind the word's start
        if first < len(tokens) and tokens[first][0] < end:
            begun[first] += (number,)
    return begun


def placed_words(rows: Sequence[Encoded], offset: Tensor) -> Tensor | None:
    """[B, W] where words begin in rows that are moved by an offset [B]; None where no row has words."""
    if not any(row.words for row in rows):
        return None
    words = pad_sequence([torch.tensor(row.words, dtype=torch.long) for row in rows], True, IGNORE)
    return words.where(words < 0, words + offset[:, None])


def numbered(labels: Sequence[Label], words: Tensor | None) -> Tensor:
    """Classes of rows [B], or of their words [B, W], without those of words that have no token."""
    if words is None:
        return torch.tensor(labels, dtype=torch.long)
    by_word = pad_sequence([torch.tensor(label, dtype=torch.long) for label in labels], True, IGNORE)
    return by_word.masked_fill(words < 0, IGNORE)
