"""Retrieval metrics of one question and their means over questions.

All functions take the ids of the retrieved documents, the best first, and of the gold documents. A document that is
retrieved several times, by several of its passages, counts at its first rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import final

from lightning_softprompt.evaluation.metrics.intervals import bootstrap

KS = (1, 5, 10)
MRR = "mrr"
FOUND, SEARCHED = "found", "searched"  # numbers of retrieved documents and of requested passages
Ids = Sequence[str]


def unique_documents(found: Ids) -> list[str]:
    """Returns the retrieved documents without duplicates.

    >>> unique_documents(["b", "a", "b"])
    ['b', 'a']
    """
    return list(dict.fromkeys(found))


def hit(found: Ids, gold: Ids, k: int) -> float:
    """Returns 1 if a gold document is among the first k, otherwise 0."""
    return float(not set(gold).isdisjoint(unique_documents(found)[:k]))


def recall(found: Ids, gold: Ids, k: int) -> float:
    """Returns the fraction of gold documents that are among the first k."""
    return len(set(gold).intersection(unique_documents(found)[:k])) / len(set(gold))


def precision(found: Ids, gold: Ids, k: int) -> float:
    """Returns the fraction of the first k ranks with gold documents; empty ranks count as wrong, as in trec_eval."""
    return len(set(gold).intersection(unique_documents(found)[:k])) / k


def reciprocal_rank(found: Ids, gold: Ids) -> float:
    """Returns 1 / rank of the first gold document; 0 if none is retrieved.

    >>> reciprocal_rank(["b", "b", "a"], ["a"])
    0.5
    """
    for rank, document in enumerate(unique_documents(found), start=1):
        if document in gold:
            return 1 / rank
    return 0.0


def ndcg(found: Ids, gold: Ids, k: int) -> float:
    """Returns the normalized discounted cumulative gain of the first k (Järvelin and Kekäläinen 2002).

    Gold documents have gain 1, with discount 1 / log2(rank + 1).
    """
    discounted = zip(_discounts(k), unique_documents(found), strict=False)
    gain = sum(discount for discount, document in discounted if document in gold)
    return gain / sum(_discounts(min(k, len(set(gold)))))


def _discounts(k: int) -> list[float]:
    return [1 / math.log2(rank + 1) for rank in range(1, k + 1)]


AT_K = {"hit": hit, "recall": recall, "precision": precision, "ndcg": ndcg}


def retrieval_names(ks: Sequence[int] = KS) -> tuple[str, ...]:
    """Returns the names of the metrics in order.

    >>> retrieval_names([5])
    ('hit@5', 'recall@5', 'precision@5', 'ndcg@5', 'mrr')
    """
    return (*(f"{name}@{k}" for k in ks for name in AT_K), MRR)


def retrieval_scores(found: Ids, gold: Ids, ks: Sequence[int] = KS) -> dict[str, float]:
    """Returns all retrieval metrics of one question by name.

    Args:
        found: Retrieved documents, the best first.
        gold: Gold documents, at least one.
        ks: Cutoff ranks.

    Raises:
        ValueError: If there are no gold documents.
    """
    if not gold:
        raise ValueError("retrieval metrics require gold documents, but a question has none; leave it out")
    at_k = {f"{name}@{k}": metric(found, gold, k) for k in ks for name, metric in AT_K.items()}
    return {**at_k, MRR: reciprocal_rank(found, gold)}


def search_scores(found: Ids, gold: Ids, searched: int) -> dict[str, float]:
    """Returns the retrieval metrics of one question, NaN if it has no gold documents, and the depth of its search."""
    scores = retrieval_scores(found, gold) if gold else dict.fromkeys(retrieval_names(), math.nan)
    return {**scores, FOUND: float(len(found)), SEARCHED: float(searched)}


def names_to_report(found: Iterable[float], searched: Iterable[float]) -> tuple[str, ...]:
    """Returns the names of the metrics to report: only cutoff ranks that at least one search reached.

    If no search retrieved anything, the cutoffs follow from the number of requested passages: the metrics are 0, not
    missing.

    Args:
        found: Number of retrieved documents of each search.
        searched: Number of requested passages of each search.

    >>> names_to_report([2, 1], [20, 20]), names_to_report([0], [0]), len(names_to_report([0], [20]))
    (('hit@1', 'recall@1', 'precision@1', 'ndcg@1', 'mrr'), (), 13)
    """
    depth = max(found, default=0) or max(searched, default=0)
    return retrieval_names([k for k in KS if k <= depth]) if depth else ()


@final
class RetrievalScores:
    """Collects the retrieval metrics of many questions.

    Args:
        ks: Cutoff ranks.
    """

    def __init__(self, ks: Sequence[int] = KS) -> None:
        self.ks = tuple(ks)
        self._values: dict[str, list[float]] = {name: [] for name in retrieval_names(ks)}

    def __len__(self) -> int:
        return len(self._values[MRR])

    def add(self, found: Ids, gold: Ids) -> None:
        """Adds a question.

        Raises:
            ValueError: If it has no gold documents.
        """
        for name, value in retrieval_scores(found, gold, self.ks).items():
            self._values[name].append(value)

    def means(self) -> dict[str, float]:
        """Returns the mean of each metric; empty if there are no questions."""
        return {name: math.fsum(values) / len(values) for name, values in self._nonempty()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns the bootstrap 95% interval of each metric over questions; empty if there are no questions."""
        return {name: bootstrap(values) for name, values in self._nonempty()}

    def _nonempty(self) -> Iterator[tuple[str, list[float]]]:
        return ((name, values) for name, values in self._values.items() if values)
