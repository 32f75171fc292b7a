"""Tests of paired differences between two runs on the same rows, with correction for several comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sign_flip_test(differences: Sequence[float], draws: int = 9999, seed: int = 0) -> float:
    """Returns the two-sided p-value of a mean difference of zero (Fisher 1935).

    The signs of the differences are flipped at random, which is valid if the two runs are exchangeable under the null
    hypothesis. Zero differences have no influence.

    Args:
        differences: One number per row.
        draws: Number of random sign vectors. The smallest p-value is 1 / (draws + 1).
        seed: Seed of the signs.

    >>> sign_flip_test([0.0, 0.0])
    1.0
    >>> sign_flip_test([1.0] * 20)
    0.0001
    """
    values = np.asarray([difference for difference in differences if difference], dtype=float)
    observed = abs(values.sum())
    generator = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, draws, 1000):  # in parts, so that memory does not grow with the draws
        signs = generator.integers(0, 2, size=(min(1000, draws - start), len(values))) * 2 - 1
        sums = np.abs(signs @ values)
        extreme += int(np.count_nonzero(sums >= observed - 1e-12 * max(1.0, observed)))
    return (extreme + 1) / (draws + 1)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that are adjusted for their number (Holm 1979): below 0.05, all errors together are below 5 %.

    >>> [round(p, 6) for p in adjust_holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted
