"""Vectors of tokens from the tokens around them in a corpus, without a neural network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix, linalg
from torch import Tensor

from lightning_softprompt.vocabulary.corpus_texts import Piece
from lightning_softprompt.vocabulary.measurement import unlimited_rules

BATCH = 64  # pieces that are tokenized together


class TokenVectors(NamedTuple):
    """Vectors of the tokens of a corpus.

    Args:
        ids: [T] ids of the tokens, ascending.
        vectors: [T, D] their vectors in float32.
    """

    ids: Tensor
    vectors: Tensor


def tokenize_pieces(pieces: Iterable[Piece], tokenizer: Any) -> Iterator[list[int]]:
    """Yields the token ids of each piece of a corpus, without special tokens."""
    remaining, rules = iter(pieces), unlimited_rules(tokenizer)
    while batch := list(islice(remaining, BATCH)):
        texts = [piece.text for piece in batch]
        for encoding in rules.encode_batch(texts, add_special_tokens=False):
            yield encoding.ids


def embed_corpus(sequences: Iterable[Sequence[int]], size: int, window: int, min_count: int) -> TokenVectors:
    """Returns vectors of tokens with similar neighbors in a corpus.

    The positive pointwise mutual information of tokens and their neighbors, factorized by a truncated singular value
    decomposition U S V^T; the vectors are U sqrt(S) (Levy, Goldberg and Dagan 2015, TACL 3).

    Args:
        sequences: The token ids of each text.
        size: D, the maximum size of the vectors.
        window: Tokens on each side of a token that are its neighbors.
        min_count: Tokens with fewer occurrences have no vector.

    Raises:
        ValueError: If fewer than three tokens are frequent enough.
    """
    counts: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for ids in sequences:
        counts.update(ids)
        for distance in range(1, window + 1):
            pairs.update(zip(ids, ids[distance:], strict=False))
    frequent = sorted(id for id, count in counts.items() if count >= min_count)
    if len(frequent) < 3:
        raise ValueError(
            f"only {len(frequent)} tokens occur at least {min_count} times in the texts; pass more text, or lower "
            "min_count"
        )
    information = _mutual_information(pairs, frequent)
    dimensions = min(size, len(frequent) - 1)
    start = np.ones(len(frequent))  # otherwise random
    left, singular, _ = linalg.svds(information, dimensions, v0=start)
    order = np.argsort(-singular)
    vectors = left[:, order] * np.sqrt(np.maximum(singular[order], 0))
    return TokenVectors(torch.tensor(frequent), torch.from_numpy(vectors.copy()).float())


def _mutual_information(pairs: Mapping[tuple[int, int], int], ids: Sequence[int]) -> csr_matrix:
    """Returns the positive pointwise mutual information [T, T] of ids: max(0, log(p(a, b) / (p(a) p(b))))."""
    places = {id: place for place, id in enumerate(ids)}
    entries = []
    for (first_id, second_id), pair_count in pairs.items():
        if first_id in places and second_id in places:
            entries.append((places[first_id], places[second_id], pair_count))
    first, second, count = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    one_sided = csr_matrix((count.astype(np.float64), (first, second)), shape=(len(ids), len(ids)))
    table = (one_sided + one_sided.T).tocoo()
    margins = np.asarray(table.sum(0)).ravel()
    expected = margins[table.row] * margins[table.col] / table.sum()
    values = np.maximum(0, np.log(table.data / expected))
    return csr_matrix((values, (table.row, table.col)), shape=table.shape)
