"""Rows of the output head for soft tokens, which must never be generated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LeastLikelyWord:
    """The word that a model predicts least, over many positions.

    Args:
        id: Its token id.
        probability: Its largest probability at any of the positions.
    """

    id: int
    probability: float


def least_likely_word(logits: Iterable[Tensor], num_words: int) -> LeastLikelyWord:
    """Returns the word whose largest probability is the smallest.

    A soft token with the row of this word in the head has its logit at every position. It can therefore only be the
    most likely token where this word is, too.

    Args:
        logits: [T, V] logits of the positions of each text.
        num_words: Number of tokens of the tokenizer; later rows of the matrix are not used by it.
    """
    largest = torch.full((num_words,), -torch.inf)
    for of_text in logits:
        log_probabilities = of_text.float().log_softmax(-1)[:, :num_words]
        largest = torch.maximum(largest, log_probabilities.max(0).values.cpu())
    word = int(largest.argmin())
    return LeastLikelyWord(word, float(largest[word].exp()))


def put_rows(matrix: Tensor, first: int, rows: Tensor) -> nn.Parameter:
    """Returns a matrix with rows at an index, which replace rows of it or follow its last one.

    Args:
        matrix: [V, H] or [V].
        first: Index of the first new row.
        rows: [P, H] or [P].
    """
    before, after = matrix[:first], matrix[first + len(rows) :]
    return nn.Parameter(torch.cat([before, rows.to(matrix.dtype), after]), requires_grad=False)


def untied_head(head: nn.Linear, first: int, count: int, word: int) -> nn.Linear:
    """Returns the head with rows for soft tokens: copies of a word's row, or an unreachable bias if it has a bias.

    Args:
        head: The head; its weights may be those of the embedding.
        first: Id of the first soft token.
        count: Number of soft tokens.
        word: Id of the word that is copied.
    """
    weight, bias = head.weight.detach(), head.bias
    new = nn.Linear(weight.shape[1], 1, bias=bias is not None, dtype=weight.dtype)
    new.weight = put_rows(weight, first, weight[word].expand(count, -1))
    new.out_features = len(new.weight)
    if bias is not None:
        least = torch.finfo(bias.dtype).min / 2  # not the minimum itself, so that adding a logit cannot overflow
        new.bias = put_rows(bias.detach(), first, torch.full((count,), least))
    return new
