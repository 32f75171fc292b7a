"""Metrics of continual learning: final scores and forgetting over a sequence of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def transfer(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the mean final score, and the backward transfer: the mean change of a score after its task was learned.

    Negative backward transfer is forgetting (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, section 3).

    Args:
        scores: [T, T], R[i, j] is the score of task j after learning task i.

    Raises:
        ValueError: If the matrix is not square or has fewer than two tasks.

    >>> average, backward = transfer([[0.9, 0.5], [0.7, 0.8]])
    >>> round(average, 3), round(backward, 3)
    (0.75, -0.2)
    """
    tasks = len(scores)
    if tasks < 2 or any(len(row) != tasks for row in scores):
        raise ValueError(
            f"scores must be a square matrix of at least two tasks, got rows of {[len(row) for row in scores]}"
        )
    changes = [scores[-1][j] - scores[j][j] for j in range(tasks - 1)]
    return fmean(scores[-1]), fmean(changes)
