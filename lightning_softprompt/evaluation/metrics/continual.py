"""What a sequence of tasks leaves of each: the score in the end, and what was forgotten on the way."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def transfer(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean score in the end, and the backward transfer: how much scores rose since their task was learnt.

    Forgetting is a backward transfer below 0 (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, section 3).

    Args:
        scores: [T, T], R[i, j] of task j after task i was learnt.

    Raises:
        ValueError: If they are not of two tasks or more, each scored after each.

    >>> average, backward = transfer([[0.9, 0.5], [0.7, 0.8]])
    >>> round(average, 3), round(backward, 3)
    (0.75, -0.2)
    """
    tasks = len(scores)
    if tasks < 2 or any(len(row) != tasks for row in scores):
        raise ValueError(f"wanted scores of two tasks or more, after each of them, got {[len(row) for row in scores]}")
    return fmean(scores[-1]), fmean(scores[-1][j] - scores[j][j] for j in range(tasks - 1))
