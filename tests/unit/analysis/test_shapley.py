"""Shapley values against their definition by orders of the members."""

import random
from itertools import permutations

import pytest

from lightning_softprompt.analysis.shapley import MAX_EXACT, leave_one_out, shapley_values, subsets_to_score


def draw_values(count):
    generator = random.Random(count)
    return {subset: generator.gauss(-20, 5) for subset in range(2**count)}


@pytest.mark.parametrize("count", range(1, 6))
def test_shapley_values_are_mean_effects_over_all_orders(count):
    values = draw_values(count)
    totals = [0.0] * count
    orders = list(permutations(range(count)))
    for order in orders:
        subset = 0
        for member in order:
            totals[member] += values[subset | 1 << member] - values[subset]
            subset |= 1 << member
    shapley = shapley_values(values, count)
    assert shapley == pytest.approx([total / len(orders) for total in totals], abs=1e-9)
    assert sum(shapley) == pytest.approx(values[2**count - 1] - values[0], abs=1e-6)


def test_a_member_without_effect_has_shapley_value_zero():
    values = draw_values(4)
    values = {subset: values[subset & ~0b0100] for subset in values}
    shapley = shapley_values(values, 4)
    assert shapley[2] == 0
    assert leave_one_out(values, 4)[2] == 0
    assert all(abs(value) > 0.01 for value in shapley[:2])


def test_subsets_are_complete_up_to_a_number_and_then_leave_one_out():
    assert sorted(subsets_to_score(MAX_EXACT)) == list(range(2**MAX_EXACT))
    count = MAX_EXACT + 1
    subsets = subsets_to_score(count)
    assert sorted(subset.bit_count() for subset in subsets) == [0, *[count - 1] * count, count]
    values = {subset: float(subset) for subset in subsets}
    assert leave_one_out(values, count) == [2.0**member for member in range(count)]


def test_neighbors_differ_in_the_last_passage():
    subsets = subsets_to_score(4)
    for one, other in zip(subsets[::2], subsets[1::2], strict=True):
        assert one ^ other == 0b1000
