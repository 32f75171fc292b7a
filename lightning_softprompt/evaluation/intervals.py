"""How sure a number is: bootstrap intervals over rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over rows (Efron 1979), for paired differences as well as for scores.

    Args:
        values: One number a row.
        level: Coverage of the interval.
        draws: Resamplings of the rows.
        seed: Of the resampling.

    >>> bootstrap([1.0] * 10)
    (1.0, 1.0)
    """
    rows = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = np.array([rows[generator.integers(len(rows), size=len(rows))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
