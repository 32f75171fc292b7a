"""How well documents were found: one question's measures, and what they come to over many.

All take the documents found, the best first, and those that are right, as ids. A document that was found twice, as by
two of its passages, stands where it was found first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import final

from lightning_softprompt.evaluation.metrics.intervals import bootstrap

KS = (1, 5, 10)
MRR = "mrr"
FOUND, SEARCHED = "found", "searched"  # how many documents a search found, and how many passages it was to find
Ids = Sequence[str]


def ranked(found: Ids) -> list[str]:
    """The documents found, each once.

    >>> ranked(["b", "a", "b"])
    ['b', 'a']
    """
    return list(dict.fromkeys(found))


def hit(found: Ids, gold: Ids, k: int) -> float:
    """Whether a right document is among the first k: 1 or 0."""
    return float(not set(gold).isdisjoint(ranked(found)[:k]))


def recall(found: Ids, gold: Ids, k: int) -> float:
    """The share of the right documents that is among the first k."""
    return len(set(gold).intersection(ranked(found)[:k])) / len(set(gold))


def precision(found: Ids, gold: Ids, k: int) -> float:
    """The share of k that is right; places that nothing was found for count as wrong, as in trec_eval."""
    return len(set(gold).intersection(ranked(found)[:k])) / k


def reciprocal_rank(found: Ids, gold: Ids) -> float:
    """One by the rank of the first right document; 0 where none was found.

    >>> reciprocal_rank(["b", "b", "a"], ["a"])
    0.5
    """
    return next((1 / rank for rank, document in enumerate(ranked(found), start=1) if document in gold), 0.0)


def ndcg(found: Ids, gold: Ids, k: int) -> float:
    """The gain of the first k by the best there could be (Järvelin and Kekäläinen 2002), right documents gaining 1.

    A document at rank r counts by 1 / log2(r + 1).
    """
    gain = sum(w for w, document in zip(_discounts(k), ranked(found), strict=False) if document in gold)
    return gain / sum(_discounts(min(k, len(set(gold)))))


def _discounts(k: int) -> list[float]:
    return [1 / math.log2(rank + 1) for rank in range(1, k + 1)]


AT_K = {"hit": hit, "recall": recall, "precision": precision, "ndcg": ndcg}


def retrieval_names(ks: Sequence[int] = KS) -> tuple[str, ...]:
    """What the measures are called, in order.

    >>> retrieval_names([5])
    ('hit@5', 'recall@5', 'precision@5', 'ndcg@5', 'mrr')
    """
    return (*(f"{name}@{k}" for k in ks for name in AT_K), MRR)


def retrieval_measures(found: Ids, gold: Ids, ks: Sequence[int] = KS) -> dict[str, float]:
    """All measures of one question, by name.

    Args:
        found: Documents, the best first.
        gold: The right ones, at least one.
        ks: How many of those found are looked at.

    Raises:
        ValueError: If no document is right, so that none could be found.
    """
    if not gold:
        raise ValueError("retrieval is measured by the documents that are right, but a question has none; leave it out")
    at_k = {f"{name}@{k}": of(found, gold, k) for k in ks for name, of in AT_K.items()}
    return {**at_k, MRR: reciprocal_rank(found, gold)}


def search_measures(found: Ids, gold: Ids, searched: int) -> dict[str, float]:
    """The measures of one question and how deep its search went; not a number if no right document is known."""
    of_search = retrieval_measures(found, gold) if gold else dict.fromkeys(retrieval_names(), math.nan)
    return {**of_search, FOUND: float(len(found)), SEARCHED: float(searched)}


def names_to_report(found: Iterable[float], searched: Iterable[float]) -> tuple[str, ...]:
    """The measures to report of many searches: none at a depth that no search reached.

    If nothing was found at all, the measures are reported to the depth of the search: they are 0, not absent.

    Args:
        found: How many documents each search found.
        searched: How many passages each was to find.

    >>> names_to_report([2, 1], [20, 20]), names_to_report([0], [0]), len(names_to_report([0], [20]))
    (('hit@1', 'recall@1', 'precision@1', 'ndcg@1', 'mrr'), (), 13)
    """
    depth = max(found, default=0) or max(searched, default=0)
    return retrieval_names([k for k in KS if k <= depth]) if depth else ()


@final
class RetrievalScores:
    """The measures of many questions.

    Args:
        ks: How many of the documents found are looked at.
    """

    def __init__(self, ks: Sequence[int] = KS) -> None:
        self.ks = tuple(ks)
        self._values: dict[str, list[float]] = {name: [] for name in retrieval_names(ks)}

    def __len__(self) -> int:
        return len(self._values[MRR])

    def add(self, found: Ids, gold: Ids) -> None:
        """Takes a question.

        Raises:
            ValueError: If no document is right.
        """
        for name, value in retrieval_measures(found, gold, self.ks).items():
            self._values[name].append(value)

    def means(self) -> dict[str, float]:
        """Each measure's mean; none without questions."""
        return {name: math.fsum(values) / len(values) for name, values in self._known()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Each measure's 95 % interval over questions, by resampling them; none without questions."""
        return {name: bootstrap(values) for name, values in self._known()}

    def _known(self) -> Iterator[tuple[str, list[float]]]:
        return ((name, values) for name, values in self._values.items() if values)
