"""Finds the first token of each labeled word of a row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_softprompt.core.types import IGNORE, Encoded, Label


def words_starting_at(tokens: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """The numbers of the words that begin with each token. A token may span several words; a word may have no token.

    Args:
        tokens: The span of each token in the text. A token may include the space before its word.
        words: The span of each word in the text.

    >>> words_starting_at([(0, 3), (3, 5), (5, 9)], [(0, 5), (6, 9)])
    [(0,), (), (1,)]
    """
    starting: list[tuple[int, ...]] = [()] * len(tokens)
    ends = [end for _, end in tokens]
    for number, (start, end) in enumerate(words):
        first = bisect_right(ends, start)  # the first token that ends after the word's start
        if first < len(tokens) and tokens[first][0] < end:
            starting[first] += (number,)
    return starting


def shift_words(rows: Sequence[Encoded], offset: Tensor) -> Tensor | None:
    """[B, W] the first token of each word in rows that begin at column `offset` [B]; None if no row has words."""
    if not any(row.words for row in rows):
        return None
    words = pad_sequence([torch.tensor(row.words, dtype=torch.long) for row in rows], True, IGNORE)
    return words.where(words < 0, words + offset[:, None])


def label_tensor(labels: Sequence[Label | None], words: Tensor | None) -> Tensor:
    """Classes of rows [B], or of their words [B, W]; `IGNORE` if a row has no class, or a word has no token.

    In a batch of several tasks, the class of a row without words is in column 0.
    """
    classes = [IGNORE if label is None else label for label in labels]
    if words is None:
        return torch.tensor(classes, dtype=torch.long)
    by_row = [torch.tensor(label if isinstance(label, tuple) else (label,), dtype=torch.long) for label in classes]
    has_no_token = (words < 0) & (words != IGNORE).any(1, keepdim=True)
    return pad_sequence(by_row, True, IGNORE).masked_fill(has_no_token, IGNORE)
