"""Compares runs of two settings: over test rows and seeds, over seeds alone, or along a series of settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.evaluation.metrics.paired_tests import sign_flip_test

DRAWS = 2000
Matrix = np.ndarray  # scores of seeds by rows, [S, R]


@dataclass(frozen=True)
class Comparison:
    """A difference with its uncertainty.

    Args:
        difference: The mean difference.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided p-value of a difference of 0.
    """

    difference: float
    low: float
    high: float
    p: float


def compare_rows(one: Matrix, other: Matrix) -> Comparison:
    """Compares the scores of the same test rows, [S, R] each, whose numbers of seeds may differ.

    A difference counts if it would be found with other rows and with other seeds, so p is the larger one of two tests:
    random signs of the differences of rows, and Welch's test of the means of seeds. The interval is a bootstrap of
    seeds and rows.
    """
    gains = one.mean(axis=0) - other.mean(axis=0)
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(DRAWS):
        rows = generator.integers(gains.size, size=gains.size)
        means = [
            scores[generator.integers(len(scores), size=len(scores))].mean(axis=0)[rows] for scores in (one, other)
        ]
        samples.append(means[0].mean() - means[1].mean())
    low, high = np.quantile(samples, [0.025, 0.975])
    p = max(sign_flip_test(gains.tolist()), welch_test(one.mean(axis=1), other.mean(axis=1)))
    return Comparison(float(gains.mean()), float(low), float(high), p)


def welch_test(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the p-value of equal means of runs (Welch 1947); a single run counts as a constant.

    >>> welch_test(np.array([1.0, 1.1, 0.9]), np.array([1.0]))
    1.0
    """
    if len(one) == len(other) == 1:
        return 0.0  # nothing is known about seeds: methods without training have none
    if np.ptp(one) == np.ptp(other) == 0:
        return float(one[0] == other[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of almost constant values
        if len(other) == 1:
            return float(stats.ttest_1samp(one, other[0]).pvalue)
        if len(one) == 1:
            return float(stats.ttest_1samp(other, one[0]).pvalue)
        return float(stats.ttest_ind(one, other, equal_var=False).pvalue)


def compare_pairs(differences: Sequence[float]) -> Comparison:
    """Compares values of the same seeds, by Student's t over their differences."""
    values = np.asarray(differences, dtype=float)
    mean, half_width = student_interval(values.tolist())
    p = welch_test(values, np.zeros(1)) if len(values) > 1 else math.nan
    return Comparison(mean, mean - half_width, mean + half_width, p)


def fit_slopes(positions: Sequence[float], values: Matrix) -> Comparison:
    """Fits a line over the binary logarithm of the positions for each seed, and returns the mean slope.

    Args:
        positions: The settings, such as lengths.
        values: A value for each seed and setting, [S, K].

    >>> comparison = fit_slopes([1, 2, 4], np.array([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]))
    >>> round(comparison.difference, 6), comparison.p
    (1.0, 0.0)
    """
    logarithms = np.log2(np.asarray(positions, dtype=float))
    slopes = [float(np.polyfit(logarithms, row, 1)[0]) for row in values]
    return compare_pairs([round(slope, 12) for slope in slopes])
