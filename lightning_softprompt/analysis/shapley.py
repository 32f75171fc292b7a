"""Shapley values, interactions and leave-one-out effects of the members of a small set (Shapley 1953).

A subset of n members is a number from 0 to 2**n - 1: bit k is set if it contains member k.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import factorial, fsum

MAX_EXACT = 6  # members up to which all subsets are evaluated
NUM_RANDOM = 64  # random subsets of larger sets
SEED = 0  # of the random subsets


def subsets_to_score(count: int) -> list[int]:
    """Returns the subsets that the effects of `count` members require.

    These are all subsets up to `MAX_EXACT` members. For more members, they are the empty set, the full set, the full
    set without each member, and `NUM_RANDOM` random subsets, in which each member is with probability 1/2. They are
    sorted such that neighbors share their first members.

    >>> [f"{subset:02b}" for subset in subsets_to_score(2)]
    ['00', '10', '01', '11']
    """
    full = 2**count - 1
    if count <= MAX_EXACT:
        subsets = set(range(full + 1))
    else:
        subsets = {0, full, *(full ^ 1 << member for member in range(count))}
        generator = random.Random(SEED)
        subsets.update(generator.getrandbits(count) for _ in range(NUM_RANDOM))
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


def pair_interactions(values: Mapping[int, float], count: int) -> list[list[float]]:
    """Returns the Shapley interaction index of each pair of `count` members (Grabisch and Roubens 1999).

    It is the mean over the subsets of the others of how much the effect of both members exceeds the sum of their single
    effects: negative if they replace each other, positive if each requires the other.

    Args:
        values: The value of each subset.
        count: Number of members.

    Returns:
        A symmetric matrix with zeros on its diagonal.

    >>> pair_interactions({0: 0.0, 1: 1.0, 2: 1.0, 3: 1.0}, 2)  # each member suffices
    [[0.0, -1.0], [-1.0, 0.0]]
    """
    interactions = [[0.0] * count for _ in range(count)]
    for member in range(count):
        for other in range(member):
            one, two = 1 << member, 1 << other
            terms = []
            for subset in range(2**count):
                if subset & (one | two):
                    continue
                size = subset.bit_count()
                weight = factorial(size) * factorial(count - size - 2) / factorial(count - 1)
                joint = values[subset | one | two] - values[subset | one] - values[subset | two] + values[subset]
                terms.append(weight * joint)
            interactions[member][other] = interactions[other][member] = fsum(terms)
    return interactions
