"""Estimates of policy-gradient objectives, against enumerated expectations, hand-computed values and loops."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch.testing import assert_close

from lightning_softprompt.objectives.policy.estimators import (
    average_tokens,
    clipped_losses,
    clipped_value_losses,
    estimate_divergences,
    generalized_advantages,
    group_advantages,
    has_equal_rewards,
    is_clipped,
    last_token_rewards,
    leave_one_out_advantages,
    ratios,
    whiten,
)
from lightning_softprompt.objectives.policy.running_moments import RunningMoments

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


@pytest.fixture
def distributions():
    """The policy, a leaf, and the reference: log-probabilities of five tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    return logits, reference


def expected_gradient(logits, reference, of_token):
    """The gradient of the expectation over tokens of the policy, where only `of_token` has a gradient."""
    logprobs = logits.log_softmax(0)
    value = (logprobs.exp().detach() * of_token(logprobs, reference)).sum()
    return torch.autograd.grad(value, logits)[0]


def test_divergences_have_the_expectations_and_gradients_of_the_table(distributions):
    logits, reference = distributions
    logprobs = logits.log_softmax(0)
    forward = (logprobs.exp() * (logprobs - reference)).sum()
    backward = (reference.exp() * (reference - logprobs)).sum()
    (gradient,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(backward, logits, retain_graph=True)
    estimates = estimate_divergences(logprobs, reference)
    for estimate in (estimates.k1, estimates.k3):
        assert_close((logprobs.exp() * estimate).sum(), forward)
    assert estimates.k3.min() >= 0

    def gradient_of(of_token):
        return expected_gradient(logits, reference, of_token)

    in_reward = gradient_of(lambda logp, ref: estimate_divergences(logp, ref).k1.detach() * logp)
    assert_close(in_reward, gradient)
    assert_close(gradient_of(lambda logp, ref: estimate_divergences(logp, ref).k1), torch.zeros_like(gradient))
    assert_close(gradient_of(lambda logp, ref: estimate_divergences(logp, ref).k2), gradient)
    assert_close(gradient_of(lambda logp, ref: estimate_divergences(logp, ref).k3), reverse_gradient)
    with_ratio = gradient_of(lambda logp, ref: ratios(logp, logp.detach()) * estimate_divergences(logp, ref).k3)
    assert_close(with_ratio, gradient)
    assert (gradient - reverse_gradient).abs().max() > 0.05


def test_divergences_of_impossible_tokens_are_finite():
    estimates = estimate_divergences(torch.tensor([0.0, -300.0]), torch.tensor([-300.0, 0.0]))
    assert all(estimate.isfinite().all() for estimate in estimates)
    assert_close(estimates.k1, torch.tensor([20.0, -20.0]))


def test_clipped_losses_have_no_gradient_beyond_the_range():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5] * 2, requires_grad=True)
    advantages = torch.tensor([1.0] * 5 + [-2.0] * 5)
    losses = clipped_losses(ratio, advantages, 0.2, 0.3)
    expected = [-0.5, -0.9, -1.0, -1.1, -1.3, 1.6, 1.8, 2.0, 2.2, 3.0]
    assert losses.tolist() == pytest.approx(expected)
    losses.sum().backward()
    no_gradient = [4, 5]
    assert (ratio.grad == 0).nonzero().flatten().tolist() == no_gradient
    assert is_clipped(ratio, advantages, 0.2, 0.3).nonzero().flatten().tolist() == no_gradient


def test_averages():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert float(average_tokens(values, mask)) == pytest.approx(18 / 5)
    assert float(average_tokens(values, mask, "rows")) == pytest.approx((2.5 + 8) / 2)
    assert float(average_tokens(values, mask, "constant", 4)) == pytest.approx(18 / 8)  # the third answer is left out
    with pytest.raises(ValueError, match="requires max_tokens"):
        average_tokens(values, mask, "constant")
    assert float(average_tokens(values, torch.zeros_like(mask))) == 0


def test_group_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    by_group = group_advantages(rewards, GROUPS)
    assert by_group.tolist() == pytest.approx([0.86588, -0.86588, -0.86588, 0.86588, 0, 0, 0, 0], abs=1e-4)
    assert group_advantages(rewards, GROUPS, "none").tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    by_batch = group_advantages(rewards, GROUPS, "batch")
    assert_close(by_batch[:4], torch.tensor([0.5, -0.5, -0.5, 0.5]) / (rewards.std() + 1e-4))
    assert has_equal_rewards(rewards, GROUPS).tolist() == [False] * 4 + [True] * 4
    almost = torch.tensor([3.0, 3.0 + 1e-6, 3.0, 3.0])
    assert group_advantages(almost, GROUPS[:4]).abs().max() == 0


def test_leave_one_out_advantages():
    rewards = torch.randn(8, dtype=torch.float64)
    advantages = leave_one_out_advantages(rewards, GROUPS)
    for position in range(8):
        others = [other for other in range(8) if other != position and GROUPS[other] == GROUPS[position]]
        expected = rewards[position] - rewards[others].mean()
        assert_close(advantages[position], expected)
    assert_close(advantages[:4], (rewards[:4] - rewards[:4].mean()) * 4 / 3)


def test_generalized_advantages_of_hand_computed_rows():
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    rewards = torch.tensor([[0.0, 0.0, 1.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.4, 0.3, 9.0, 9.0], [0.1, 0.2, 0.3, 0.4, 0.5]])
    advantages, returns = generalized_advantages(rewards, values, mask)
    assert advantages[0].tolist() == pytest.approx([0.43675, 0.565, 0.7, 0, 0])
    assert returns[0].tolist() == pytest.approx([0.93675, 0.965, 1, 0, 0])
    alone = generalized_advantages(rewards[:1, :3], values[:1, :3], mask[:1, :3])
    assert_close(alone[0][0], advantages[0, :3])
    _, all_returns = generalized_advantages(rewards, values, mask, decay=1.0)
    assert_close(all_returns, mask.float())
    errors, _ = generalized_advantages(rewards, values, mask, decay=0.0)
    assert errors[0].tolist() == pytest.approx([-0.1, -0.1, 0.7, 0, 0])
    discounted, _ = generalized_advantages(rewards, values, mask, discount=0.9, decay=0.8)
    assert float(discounted[0, 1]) == pytest.approx((0.9 * 0.3 - 0.4) + 0.9 * 0.8 * 0.7)


def test_whitening_over_two_processes_is_that_of_all_rows():
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    expected = whiten(values, mask)
    sums, barrier = {}, Barrier(2)

    def run(part):
        def total(value):
            sums[part] = value.clone()
            barrier.wait()
            result = sums[0] + sums[1]
            barrier.wait()
            return result

        rows = slice(0, 2) if part == 0 else slice(2, 5)
        return whiten(values[rows], mask[rows], total)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run, range(2)))
    assert_close(torch.cat(parts), expected, atol=1e-6, rtol=1e-5)
    assert float(expected[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(expected[mask].std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_running_moments_are_those_of_all_values():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moments = RunningMoments().add(values[:7]).add(values[7:8]).add(values[8:])
    assert moments.mean == pytest.approx(float(values.mean()))
    assert moments.std == pytest.approx(float(values.std(unbiased=False)))
    assert RunningMoments().add(torch.ones(3)).std == 1


def test_value_losses_are_those_of_a_loop():
    values, old, returns = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    losses = clipped_value_losses(values, old, returns, 0.2)
    for b in range(4):
        for u in range(5):
            v, before, target = (float(tensor[b, u]) for tensor in (values, old, returns))
            clipped = min(max(v, before - 0.2), before + 0.2)
            larger = max((v - target) ** 2, (clipped - target) ** 2)
            assert float(losses[b, u]) == pytest.approx(0.5 * larger, rel=1e-5)


def test_whitening_and_rewards_at_the_last_token_ignore_padding():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, -100.0]])
    white = whiten(values, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white[mask].std(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert white[1, 1:].tolist() == [0, 0]
    assert last_token_rewards(torch.tensor([5.0, 7.0]), mask).tolist() == [[0, 0, 5], [7, 0, 0]]
    assert whiten(values[1:, :1], mask[1:, :1]).tolist() == [[0]]
