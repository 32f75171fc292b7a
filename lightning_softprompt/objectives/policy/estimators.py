"""Estimates that policy-gradient objectives share: divergences, clipped losses, advantages and averages.

Rows [B] are answers, and columns [U] their tokens. A mask [B, U] is True on the tokens of an answer up to and including
the first EOS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # log-probability ratios are limited to this size, so that their exponential stays finite
EPSILON = 1e-4  # is added to the standard deviation of rewards
TIE = 1e-6  # rewards of a group that differ by less, relative to the largest reward, are equal

Total = Callable[[Tensor], Tensor]
Average = Literal["tokens", "rows", "constant"]
Scale = Literal["group", "batch", "none"]


class Divergences(NamedTuple):
    """Estimates [B, U] of KL(policy || reference) from answers of the policy (Schulman 2020, "Approximating KL").

    With d = log reference - log policy, they are k1 = -d, k2 = d^2 / 2 and k3 = e^d - 1 - d. In expectation, k1 and k3
    equal the divergence. Their gradients differ: as a term of a loss, the gradient of k1 is 0, that of k2 is the
    gradient of KL(policy || reference), and that of k3 is the gradient of KL(reference || policy). As a part of the
    reward, k1 has the gradient of KL(policy || reference).

    Args:
        k1: The estimate without bias, which may be negative.
        k2: Half the squared log ratio.
        k3: The estimate without bias that is never negative.
    """

    k1: Tensor
    k2: Tensor
    k3: Tensor


def estimate_divergences(logprobs: Tensor, reference: Tensor) -> Divergences:
    """Returns estimates of the divergence from the reference at each token.

    Args:
        logprobs: Log-probabilities [B, U] of the tokens under the policy.
        reference: Those under the reference.
    """
    difference = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return Divergences(-difference, difference.square() / 2, torch.expm1(difference) - difference)


def ratios(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Returns the probability of each token [B, U], divided by its probability when the answer was generated."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_losses(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Returns -min(ratio A, clip(ratio, 1 - low, 1 + high) A) (Schulman et al. 2017, eq. 7).

    Args:
        ratio: Probability ratios [B, U] or [B].
        advantages: Advantages A of the same shape.
        low: How far below 1 a ratio still changes the loss.
        high: How far above 1.
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Returns where the loss of `clipped_losses` has no gradient, as bool."""
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


def average_tokens(values: Tensor, mask: Tensor, by: Average = "tokens", max_tokens: int | None = None) -> Tensor:
    """Returns the average of values over the tokens of answers.

    Args:
        values: Values [B, U].
        mask: Which tokens count.
        by: `tokens` averages over all tokens (Yu et al. 2025, DAPO); `rows` over the tokens of each answer and then
            over answers (Shao et al. 2024), which gives a token of a long answer a smaller weight; `constant` divides
            the sum by the number of answers times `max_tokens` (Liu et al. 2025, Dr. GRPO).
        max_tokens: The largest number of tokens of an answer, for `constant`.
    """
    values = values.where(mask, 0)
    if by == "tokens":
        return values.sum() / mask.sum().clamp(min=1)
    if by == "rows":
        counts = mask.sum(1)
        means = values.sum(1) / counts.clamp(min=1)
        return means.sum() / (counts > 0).sum().clamp(min=1)
    if max_tokens is None:
        raise ValueError("by='constant' requires max_tokens")
    return values.sum() / (mask.any(1).sum().clamp(min=1) * max_tokens)


def sum_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum [B] of values [B, U] over the tokens of each answer."""
    return values.where(mask, 0).sum(1)


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """Returns for each answer the mean of values [B] over the answers to its question.

    Args:
        values: A value of each answer.
        groups: The question [B] of each answer, as numbers from 0.
    """
    sums = values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)
    return (sums / torch.bincount(groups))[groups]


def group_advantages(rewards: Tensor, groups: Tensor, scale: Scale = "group") -> Tensor:
    """Returns how much better each answer is than the mean answer to its question (Shao et al. 2024, eq. 3).

    Args:
        rewards: Rewards [B].
        groups: The question [B] of each answer, as numbers from 0.
        scale: `group` divides by the standard deviation of the rewards of the question, `batch` by that of all rewards,
            and `none` by nothing (Liu et al. 2025). Where all rewards of a question are equal, the advantages are 0.
    """
    centered = rewards - group_means(rewards, groups)
    centered = centered.where(~has_equal_rewards(rewards, groups), 0)
    if scale == "none":
        return centered
    if scale == "batch":
        return centered / (rewards.std() + EPSILON)
    degrees = (torch.bincount(groups)[groups] - 1).clamp(min=1)
    counts = torch.bincount(groups)[groups]
    variances = group_means(centered.square(), groups) * counts / degrees
    return centered / (variances.sqrt() + EPSILON)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Returns how much better each answer is than the mean of the other answers (Ahmadian et al. 2024, RLOO).

    Args:
        rewards: Rewards [B].
        groups: The question [B] of each answer, as numbers from 0. Each question has at least two answers.
    """
    counts = torch.bincount(groups)[groups]
    return (rewards - group_means(rewards, groups)) * counts / (counts - 1)


def has_equal_rewards(rewards: Tensor, groups: Tensor) -> Tensor:
    """Returns for each answer whether all answers to its question have the same reward, as bool [B]."""
    size = int(groups.max()) + 1
    largest = rewards.new_full((size,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    smallest = rewards.new_full((size,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    return ((largest - smallest) <= TIE * rewards.abs().max())[groups]


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, decay: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Returns advantages and returns [B, U] of tokens (Schulman et al. 2016, GAE).

    With delta_t = r_t + g V_{t+1} - V_t, the advantage is A_t = delta_t + g l A_{t+1}. Behind the last token, V and A
    are 0. The return is A_t + V_t.

    Args:
        rewards: Reward r of each token.
        values: Value V of the state before each token.
        mask: Which tokens belong to the answer: the first ones of each row.
        discount: g.
        decay: l; 1 gives returns minus values, 0 the errors delta.
    """
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for position in reversed(range(values.shape[1])):
        delta = rewards[:, position] + discount * next_value - values[:, position]
        advantage = (delta + discount * decay * next_advantage).where(mask[:, position], 0)
        advantages[:, position] = advantage
        next_value, next_advantage = values[:, position], advantage
    return advantages, (advantages + values).where(mask, 0)


def whiten(values: Tensor, mask: Tensor, total: Total = torch.clone) -> Tensor:
    """Returns values [B, U] with mean 0 and variance 1 over the tokens of all answers, and 0 elsewhere.

    Args:
        values: The values.
        mask: Which of them count.
        total: Sums a tensor over all processes (default: there is only one).
    """
    selected = values[mask]
    count = total(mask.sum()).clamp(min=1)
    centered = values - total(selected.sum()) / count
    variance = total(centered[mask].square().sum()) / count
    return (centered / (variance.sqrt() + 1e-8)).where(mask, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Returns the share of the variance of returns [B, U] that values explain: 1 at best, 0 for a constant."""
    if mask.sum() < 2:
        return returns.new_zeros(())
    errors = returns[mask] - values[mask]
    return 1 - errors.var(unbiased=False) / returns[mask].var(unbiased=False).clamp(min=1e-8)


def clipped_value_losses(values: Tensor, old_values: Tensor, returns: Tensor, limit: float) -> Tensor:
    """Returns max((V - R)^2, (V' - R)^2) / 2 at each token [B, U], with V' within `limit` of the old value.

    Args:
        values: Values V.
        old_values: Values when the answers were sampled.
        returns: Returns R.
        limit: How far V' may be from the old value.
    """
    clipped = old_values + (values - old_values).clamp(-limit, limit)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def adapt_weight(weight: float, divergence: float, target: float, share: float) -> float:
    """Returns the weight of a divergence, adapted towards a target (Ziegler et al. 2019, section 2.2).

    Args:
        weight: The weight until now.
        divergence: The divergence per answer.
        target: Its target.
        share: Number of answers divided by the horizon.
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return weight * (1 + error * min(share, 1.0))


def last_token_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """Returns rewards [B, U] that are 0 except at the last token of each answer.

    Args:
        rewards: The reward [B] of each answer.
        mask: Which tokens belong to the answer: the first ones of each row.
    """
    last = (mask.sum(1) - 1).clamp(min=0)
    return torch.zeros_like(mask, dtype=rewards.dtype).scatter(1, last[:, None], rewards[:, None])
