"""Where the words of a row that have classes begin among its tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_softprompt.core.types import IGNORE, Encoded, Label


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


def numbered(labels: Sequence[Label | None], words: Tensor | None) -> Tensor:
    """Classes of rows [B], or of their words [B, W], without those of words that have no token.

    `IGNORE` stands where a row has none. In a batch of several tasks the class of a row without words stands first.
    """
    if words is None:
        return torch.tensor([IGNORE if label is None else label for label in labels], dtype=torch.long)
    each = [IGNORE if label is None else label for label in labels]
    by_row = [torch.tensor(label if isinstance(label, tuple) else (label,), dtype=torch.long) for label in each]
    silent = (words < 0) & (words != IGNORE).any(1, keepdim=True)
    return pad_sequence(by_row, True, IGNORE).masked_fill(silent, IGNORE)
