"""Shapley values and leave-one-out effects of the members of a small set (Shapley 1953).

A subset of n members is a number from 0 to 2**n - 1: bit k is set if it contains member k.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import factorial, fsum

MAX_EXACT = 5  # members up to which all subsets are evaluated


def subsets_to_score(count: int) -> list[int]:
    """Returns the subsets that the effects of `count` members require.

    These are all subsets up to `MAX_EXACT` members, and else the empty set, the full set and the full set without each
    member. They are sorted such that neighbors share their first members.

    >>> [f"{subset:02b}" for subset in subsets_to_score(2)]
    ['00', '10', '01', '11']
    """
    full = 2**count - 1
    if count <= MAX_EXACT:
        subsets = set(range(full + 1))
    else:
        subsets = {0, full, *(full ^ 1 << member for member in range(count))}
    return sorted(subsets, key=lambda subset: members_of(subset, count))


def members_of(subset: int, count: int) -> list[bool]:
    """Returns whether a subset contains each of `count` members."""
    return [bool(subset >> member & 1) for member in range(count)]


def leave_one_out(values: Mapping[int, float], count: int) -> list[float]:
    """Returns how much the value of the full set is larger than without each of `count` members.

    Args:
        values: The value of each subset; at least those of the full set and without each member.
        count: Number of members.

    >>> leave_one_out({0: 0.0, 1: 1.0, 2: 2.0, 3: 2.5}, 2)
    [0.5, 1.5]
    """
    full = 2**count - 1
    return [values[full] - values[full ^ 1 << member] for member in range(count)]


def shapley_values(values: Mapping[int, float], count: int) -> list[float]:
    """Returns the Shapley value of each of `count` members: its mean effect over all orders in which members join.

    They add up to the value of the full set minus that of the empty set.

    Args:
        values: The value of each subset.
        count: Number of members.

    >>> shapley_values({0: 0.0, 1: 1.0, 2: 2.0, 3: 2.5}, 2)
    [0.75, 1.75]
    """
    shapley = []
    for member in range(count):
        bit = 1 << member
        terms = []
        for subset in range(2**count):
            if subset & bit:
                continue
            size = subset.bit_count()
            weight = factorial(size) * factorial(count - size - 1) / factorial(count)
            terms.append(weight * (values[subset | bit] - values[subset]))
        shapley.append(fsum(terms))
    return shapley
