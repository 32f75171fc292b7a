"""Divides the rows of one source into training, validation and test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def divide_rows(labels: Sequence[Any], shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Divides rows at random, so that each part has nearly the same share of every class.

    Each part takes rows at equal distances from a random order in which the rows of a class are adjacent. The number
    of its rows of a class therefore differs by less than two from the exact share.

    Args:
        labels: The class of each row; None for all rows of a task without classes.
        shares: Share of all rows that each part other than `train` takes, at least one row.
        seed: Seed of the order.

    Returns:
        The sorted indices of the rows of each part, and of the remaining rows as `train`.

    >>> divide_rows([0, 0, 0, 0, 1, 1, 1, 1], {"test": 0.25}, seed=0)["test"]
    [0, 5]
    """
    random_order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    rest = sorted(random_order, key=lambda row: numbers[labels[row]])  # a stable sort
    parts = {}
    for name, share in shares.items():
        count = min(len(rest), max(1, round(share * len(labels))))
        positions = {int((number + 0.5) * len(rest) / count) for number in range(count)}
        parts[name] = sorted(rest[position] for position in positions)
        rest = [row for position, row in enumerate(rest) if position not in positions]
    return {"train": sorted(rest), **parts}


def hold_out_validation(count: int, share: float, seed: int) -> dict[str, list[int]]:
    """Divides training rows at random into training and validation rows.

    Args:
        count: Number of rows.
        share: Share of the rows that are held out for validation, at least one row.
        seed: Seed of the order.

    Returns:
        The sorted indices of the rows of `train` and `validation`.
    """
    order = np.random.default_rng(seed).permutation(count)
    num_held_out = max(1, round(share * len(order)))
    return {"train": sorted(order[num_held_out:]), "validation": sorted(order[:num_held_out])}


def divide_many(count: int, shares: Mapping[str, float], seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """Divides rows without classes as `divide_rows` does, with little memory.

    >>> {name: rows.tolist() for name, rows in divide_many(6, {"test": 0.3}, seed=0).items()}
    {'train': [1, 3, 4, 5], 'test': [0, 2]}
    """
    rest = np.random.default_rng(seed).permutation(count)
    parts = {}
    for name, share in shares.items():
        part = min(len(rest), max(1, round(share * count)))
        positions = ((np.arange(part) + 0.5) * len(rest) / max(1, part)).astype(np.int64)
        parts[name] = np.sort(rest[positions])
        rest = np.delete(rest, positions)
    return {"train": np.sort(rest), **parts}
