"""Rows of new tokens as sums of the rows of similar existing tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.prompts.token_rows.base import TokenRowsInit
from lightning_softprompt.vocabulary.corpus_texts import read_pieces
from lightning_softprompt.vocabulary.token_vectors import embed_corpus, tokenize_pieces

log = logging.getLogger(__name__)
CHUNK = 256  # new tokens whose similarities to all existing ones are in memory at once


@dataclass(frozen=True)
class Focus(TokenRowsInit):
    """Weighted sums of the rows of existing tokens with similar neighbors in a corpus (Dobler and de Melo 2023).

    FOCUS, arXiv 2305.14481. The row of a new token t is `sum_j w_j E[j]` over the existing tokens j that the texts
    contain, with `w = sparsemax(cos(a_t, a_j))` of auxiliary vectors a. A new token without a vector gets a row from
    the normal distribution with mean and standard deviation of each column of the table. The paper trains the
    auxiliary vectors with fastText. Here, they are a factorization of the mutual information of neighboring tokens,
    which requires no further package.

    Args:
        texts: Texts with the new tokens, such as the training texts: files, folders, patterns or hub data sets.
        columns: Columns of the text in rows; the first one that a row has is read.
        size: Size of the auxiliary vectors.
        window: Tokens on each side of a token that are its neighbors.
        min_count: Tokens with fewer occurrences in the texts have no vector.

    Raises:
        ValueError: If there are no texts, or a number is too small.
    """

    texts: str | Sequence[str]
    columns: Sequence[str] = ("text",)
    size: int = 100
    window: int = 5
    min_count: int = 10

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("Focus requires texts that contain the new tokens")
        for name in ("size", "window", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of Focus must be at least 1, got {getattr(self, name)}")

    def __call__(self, backbone: Backbone, tables: Sequence[Tensor], tokens: Sequence[AddedRow]) -> list[Tensor]:
        """See `TokenRowsInit`."""
        pieces = read_pieces([self.texts] if isinstance(self.texts, str) else self.texts, self.columns)
        sequences = tokenize_pieces(pieces, backbone.codec.tokenizer)
        ids, vectors = embed_corpus(sequences, self.size, self.window, self.min_count)
        is_existing = ids < len(tables[0])
        if not is_existing.any():
            raise ValueError(
                "Focus requires texts that contain existing tokens, too; pass more text, or lower min_count"
            )
        rows_of = {id: row for row, id in enumerate(ids.tolist())}
        with_vector = [number for number, token in enumerate(tokens) if token.id in rows_of]
        if len(with_vector) < len(tokens):
            log.warning(
                "Focus: %d of %d new tokens occur fewer than %d times in the texts; their rows are random",
                len(tokens) - len(with_vector), len(tokens), self.min_count,
            )  # fmt: skip
        new_vectors = vectors[[rows_of[tokens[number].id] for number in with_vector]]
        existing_ids = ids[is_existing]
        results = []
        for table in tables:
            rows = table.float()
            initial = rows.mean(0) + torch.randn(len(tokens), rows.shape[1]).to(rows) * rows.std(0)
            sums = _sum_similar_rows(new_vectors, vectors[is_existing], rows[existing_ids.to(rows.device)])
            initial[with_vector] = sums
            results.append(initial)
        return results


def _sum_similar_rows(new: Tensor, existing: Tensor, rows: Tensor) -> Tensor:
    """Returns sums [N, H] of rows [T, H], with the weights sparsemax(cos(new [N, D], existing [T, D]))."""
    directions = normalize(existing, dim=1)
    sums = []
    for part in new.split(CHUNK):
        similarities = normalize(part, dim=1) @ directions.T
        sums.append(sparsemax(similarities).to(rows) @ rows)
    return torch.cat(sums) if sums else rows.new_zeros(0, rows.shape[1])


def sparsemax(scores: Tensor) -> Tensor:
    """Projects rows of scores [N, T] onto the probability simplex (Martins and Astudillo 2016, arXiv 1602.02068).

    >>> sparsemax(torch.tensor([[1.0, 0.5, -2.0]]))
    tensor([[0.7500, 0.2500, 0.0000]])
    """
    ordered = scores.sort(dim=1, descending=True).values
    sums = ordered.cumsum(1)
    counts = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    is_in_support = 1 + counts * ordered > sums
    sizes = is_in_support.sum(1, keepdim=True)
    thresholds = (sums.gather(1, sizes - 1) - 1) / sizes
    return (scores - thresholds).clamp(min=0)
