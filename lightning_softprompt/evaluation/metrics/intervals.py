"""Confidence intervals: bootstrap over rows, Student's t over seeds.

numpy and scipy are imported where they are needed, because `softprompt runs` starts without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Returns the bootstrap percentile interval of the mean over rows (Efron 1979), of scores or paired differences.

    Args:
        values: One number per row.
        level: Coverage of the interval.
        draws: Number of resamples.
        seed: Seed of the resampling.

    >>> bootstrap([1.0] * 10)
    (1.0, 1.0)
    """
    import numpy as np

    rows = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    samples = (generator.integers(len(rows), size=len(rows)) for _ in range(draws))
    means = np.array([rows[sample].mean() for sample in samples])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    level: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the bootstrap percentile interval of a ratio of sums over rows.

    Args:
        numerators: One number per row.
        denominators: One number above 0 per row.
        level: Coverage of the interval.
        draws: Number of resamples.
        seed: Seed of the resampling.

    >>> bootstrap_ratio([2.0, 4.0], [1.0, 2.0])
    (2.0, 2.0)
    """
    import numpy as np

    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    generator = np.random.default_rng(seed)
    ratios = np.empty(draws)
    for number in range(draws):
        sample = generator.integers(len(above), size=len(above))
        ratios[number] = above[sample].sum() / below[sample].sum()
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(share: float, rows: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share of rows (Wilson 1927).

    Args:
        share: The share, from 0 to 1.
        rows: The number of rows.
        level: Coverage of the interval.

    >>> [round(bound, 3) for bound in share_interval(0.9, 100)]
    [0.826, 0.945]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    weight = z * z / rows  # of the prior share of one half
    center = (share + weight / 2) / (1 + weight)
    spread = share * (1 - share) / rows + weight / (4 * rows)
    half = z * spread**0.5 / (1 + weight)
    return max(center - half, 0.0), min(center + half, 1.0)


def student_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Returns the mean over runs and the half-width of its interval (Student 1908), which is infinite for one run.

    Args:
        values: One number per run.
        level: Coverage of the interval.

    >>> mean, half = student_interval([0.8, 0.9, 1.0])
    >>> round(mean, 3), round(half, 3)
    (0.9, 0.248)
    """
    import numpy as np
    from scipy.stats import t

    runs = np.asarray(values, dtype=float)
    if len(runs) < 2:
        return float(runs.mean()), float("inf")
    quantile = t.ppf((1 + level) / 2, len(runs) - 1)
    half_width = quantile * runs.std(ddof=1) / len(runs) ** 0.5
    return float(runs.mean()), float(half_width)
