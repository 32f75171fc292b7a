"""Rankings of passages, and what is made of several: reciprocal rank fusion, weighted scores."""

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
    """Passages by their rows in the index, best first.

    Args:
        rows: [k]
        scores: [k], falling.
    """

    rows: Rows
    scores: Floats

    def __len__(self) -> int:
        return len(self.rows)


def top_k(rows: NDArray[Any], scores: NDArray[Any], k: int) -> Ranking:
    """The k best of scored rows; of equal scores the row that stands first in the corpus."""
    if k < len(scores):  # all that score as well as the k-th take part, or ties would go by chance
        kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        rows, scores = rows[kept], scores[kept]
    order = np.lexsort((rows, -scores))[:k]
    return Ranking(rows[order].astype(np.int64), scores[order].astype(np.float32))


class Fusion(ABC):
    """How the lexical and the dense ranking of a question become one."""

    @abstractmethod
    def points(self, ranking: Ranking) -> Iterable[float]:
        """What each place of a ranking is worth."""

    @abstractmethod
    def weights(self) -> Sequence[float]:
        """What the lexical and the dense ranking weigh."""

    @final
    def __call__(self, lexical: Ranking, dense: Ranking, k: int) -> Ranking:
        """The k best of both. What a ranking does not hold gets nothing from it."""
        total: dict[int, float] = {}
        for weight, ranking in zip(self.weights(), (lexical, dense), strict=True):
            for row, points in zip(ranking.rows.tolist(), self.points(ranking), strict=True):
                total[row] = total.get(row, 0.0) + weight * points
        return top_k(np.array(list(total), np.int64), np.array(list(total.values()), np.float64), k)


@final
@dataclass(frozen=True)
class ReciprocalRank(Fusion):
    """1 / (offset + rank), summed (Cormack et al. 2009, "Reciprocal rank fusion outperforms Condorcet").

    Args:
        offset: The paper's k: how little the first places stand out.
        dense: What the dense ranking weighs; the lexical weighs the rest of 1.
    """

    offset: int = 60
    dense: float = 0.5

    def __post_init__(self) -> None:
        check_weight(self.dense)

    def points(self, ranking: Ranking) -> Iterable[float]:
        """1 / (offset + rank), ranks from 1."""
        return [1 / (self.offset + rank) for rank in range(1, len(ranking) + 1)]

    def weights(self) -> Sequence[float]:
        """What the two rankings weigh."""
        return 1 - self.dense, self.dense


@final
@dataclass(frozen=True)
class WeightedScores(Fusion):
    """Scores brought to 0 .. 1 within each ranking, weighed and summed.

    Args:
        dense: What the dense ranking weighs; the lexical weighs the rest of 1.
    """

    dense: float = 0.5

    def __post_init__(self) -> None:
        check_weight(self.dense)

    def points(self, ranking: Ranking) -> Iterable[float]:
        """(score - least) / (most - least); 1 where all are the same."""
        if not len(ranking):
            return []
        least, most = float(ranking.scores[-1]), float(ranking.scores[0])
        return [(s - least) / (most - least) if most > least else 1.0 for s in ranking.scores.tolist()]

    def weights(self) -> Sequence[float]:
        """What the two rankings weigh."""
        return 1 - self.dense, self.dense


def check_weight(dense: float) -> None:
    """Refuses a weight that is no share.

    Raises:
        ValueError: If it is not from 0 to 1.
    """
    if not 0 <= dense <= 1:
        raise ValueError(f"dense is the share of the dense ranking, from 0 to 1; got {dense}")
