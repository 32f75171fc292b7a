"""Shapley values and interactions against their definitions by orders of the members, LASSO against scikit-learn."""

import math
import random
from itertools import permutations

import pytest
import torch
from sklearn.linear_model import Lasso

from lightning_softprompt.analysis.context_cite import lasso, linear_effects
from lightning_softprompt.analysis.shapley import (
    MAX_EXACT,
    leave_one_out,
    pair_interactions,
    shapley_values,
    subsets_to_score,
)


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


@pytest.mark.parametrize("count", [2, 4])
def test_interactions_are_mean_joint_effects_over_all_orders(count):
    """A pair counts as one member of the orders."""
    values = draw_values(count)
    interactions = pair_interactions(values, count)
    for one, other in permutations(range(count), 2):
        others = [member for member in range(count) if member not in (one, other)]
        joint_effects = []
        for order in permutations([*others, "pair"]):
            before = sum(1 << member for member in order[: order.index("pair")])
            first, second = 1 << one, 1 << other
            single = values[before | first] + values[before | second] - values[before]
            joint_effects.append(values[before | first | second] - single)
        mean = math.fsum(joint_effects) / len(joint_effects)
        assert interactions[one][other] == pytest.approx(mean, abs=1e-9)
    assert all(interactions[member][member] == 0 for member in range(count))


def test_subsets_are_complete_up_to_a_number_and_then_random():
    assert sorted(subsets_to_score(MAX_EXACT)) == list(range(2**MAX_EXACT))
    count = 40
    subsets = subsets_to_score(count)
    full = 2**count - 1
    assert {0, full, *(full ^ 1 << member for member in range(count))} < set(subsets)
    assert len(subsets) == len(set(subsets)) == 2 + count + 64
    assert subsets == subsets_to_score(count)
    assert 16 < sum(subset.bit_count() for subset in subsets if 5 < subset.bit_count() < 35) / 64 < 24
    values = {subset: float(subset) for subset in subsets}
    assert leave_one_out(values, count) == [2.0**member for member in range(count)]


def test_neighbors_differ_in_the_last_passage():
    subsets = subsets_to_score(4)
    for one, other in zip(subsets[::2], subsets[1::2], strict=True):
        assert one ^ other == 0b1000


def test_the_lasso_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0, unbiased=False)
    outputs = inputs[:, 0] * 0.5 - inputs[:, 3] * 0.2 + 0.1 * torch.randn(50, generator=generator, dtype=torch.float64)
    outputs -= outputs.mean()
    expected = Lasso(alpha=0.05, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(inputs, outputs).coef_
    weights = lasso(inputs, outputs, 0.05)
    assert weights.tolist() == pytest.approx(list(expected), abs=1e-8)
    assert 0 < (weights == 0).sum() < 9


def test_a_linear_model_of_log_odds_has_its_weights():
    count, num_tokens = 8, 4
    effects = [3.0, 0.0, -2.0, 0.0, 0.0, 5.0, 0.0, 0.0]
    log_probabilities = {}
    for subset in subsets_to_score(count):
        log_odds = -12 + sum(effect for member, effect in enumerate(effects) if subset >> member & 1)
        log_probabilities[subset] = -math.log1p(math.exp(-log_odds))
    assert linear_effects(log_probabilities, count, num_tokens, penalty=0) == pytest.approx(effects, abs=1e-6)
    sparse = linear_effects(log_probabilities, count, num_tokens)
    assert [effect == 0 for effect in sparse] == [effect == 0 for effect in effects]
    assert sparse == pytest.approx(effects, abs=0.2)


def test_a_certain_answer_has_finite_effects():
    log_probabilities = {subset: 0.0 if subset & 1 else -1.0 for subset in subsets_to_score(8)}
    effects = linear_effects(log_probabilities, 8, 1)
    assert effects[0] > 1
    assert max(map(abs, effects[1:])) < 1e-6
