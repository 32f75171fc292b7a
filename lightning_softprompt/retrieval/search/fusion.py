"""Rankings of passages and their fusion: reciprocal rank fusion, weighted scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """Passages as rows of the index, the best first.

    Args:
        rows: [k]
        scores: [k], in descending order.
    """

    rows: Rows
    scores: Floats

    def __len__(self) -> int:
        return len(self.rows)


def top_k(rows: NDArray[Any], scores: NDArray[Any], k: int) -> Ranking:
    """Returns the k rows with the highest scores. Ties are broken by the lower row."""
    if k < len(scores):  # includes all rows with the k-th score, since a partition breaks ties arbitrarily
        kth = len(scores) - k
        is_candidate = scores >= np.partition(scores, kth)[kth]
        rows, scores = rows[is_candidate], scores[is_candidate]
    order = np.lexsort((rows, -scores))[:k]
    return Ranking(rows[order].astype(np.int64), scores[order].astype(np.float32))


class Fusion(ABC):
    """Fuses the lexical and the dense ranking of a question."""

    @abstractmethod
    def points(self, ranking: Ranking) -> Iterable[float]:
        """Returns the points of each rank of a ranking."""

    @abstractmethod
    def weights(self) -> Sequence[float]:
        """Returns the weights of the lexical and the dense ranking."""

    @final
    def __call__(self, lexical: Ranking, dense: Ranking, k: int) -> Ranking:
        """Returns the k best rows of both rankings. A row gets no points from a ranking that lacks it."""
        total: dict[int, float] = {}
        for weight, ranking in zip(self.weights(), (lexical, dense), strict=True):
            for row, points in zip(ranking.rows.tolist(), self.points(ranking), strict=True):
                total[row] = total.get(row, 0.0) + weight * points
        rows, scores = np.array(list(total), np.int64), np.array(list(total.values()), np.float64)
        return top_k(rows, scores, k)


@final
@dataclass(frozen=True)
class ReciprocalRank(Fusion):
    """1 / (offset + rank), summed (Cormack et al. 2009, "Reciprocal rank fusion outperforms Condorcet").

    Args:
        offset: The constant k of the paper: higher values reduce the advantage of the first ranks.
        dense: Weight of the dense ranking; the lexical ranking has the weight 1 - dense.
    """

    offset: int = 60
    dense: float = 0.5

    def __post_init__(self) -> None:
        check_weight(self.dense)

    def points(self, ranking: Ranking) -> Iterable[float]:
        """Returns 1 / (offset + rank), with ranks from 1."""
        return [1 / (self.offset + rank) for rank in range(1, len(ranking) + 1)]

    def weights(self) -> Sequence[float]:
        """Returns the weights of the two rankings."""
        return 1 - self.dense, self.dense


@final
@dataclass(frozen=True)
class WeightedScores(Fusion):
    """Scores that are scaled to 0 .. 1 within each ranking, and summed with weights.

    Args:
        dense: Weight of the dense ranking; the lexical ranking has the weight 1 - dense.
    """

    dense: float = 0.5

    def __post_init__(self) -> None:
        check_weight(self.dense)

    def points(self, ranking: Ranking) -> Iterable[float]:
        """Returns (score - lowest) / (highest - lowest), or 1 if all scores are equal."""
        if not len(ranking):
            return []
        lowest, highest = float(ranking.scores[-1]), float(ranking.scores[0])
        if lowest == highest:
            return [1.0] * len(ranking)
        return [(score - lowest) / (highest - lowest) for score in ranking.scores.tolist()]

    def weights(self) -> Sequence[float]:
        """Returns the weights of the two rankings."""
        return 1 - self.dense, self.dense


def check_weight(dense: float) -> None:
    """Checks the weight of the dense ranking.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if not 0 <= dense <= 1:
        raise ValueError(f"dense, the weight of the dense ranking, must be between 0 and 1, got {dense}")
