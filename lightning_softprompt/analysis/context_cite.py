"""Effects of the members of a large set by a sparse linear model of random subsets.

Source: Cohen-Wang et al. 2024, ContextCite.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_softprompt.analysis.shapley import members_of

PENALTY = 0.01  # of the absolute weights, as in the code of ContextCite
MAX_SWEEPS = 1000
TOLERANCE = 1e-10


def linear_effects(
    log_probabilities: Mapping[int, float], count: int, num_tokens: int, penalty: float = PENALTY
) -> list[float]:
    """Returns the weight of each of `count` members in a linear model of the log-odds of an answer, in nats.

    The model predicts log(p / (1 - p)) per token of the answer from the members of a subset. It is a LASSO fit to all
    evaluated subsets, with each membership divided by its standard deviation, so weak members have the weight 0.

    Args:
        log_probabilities: log p(answer) of each evaluated subset.
        count: Number of members.
        num_tokens: Number of tokens of the answer.
        penalty: Weight of the penalty.
    """
    memberships = torch.tensor([members_of(subset, count) for subset in log_probabilities], dtype=torch.float64)
    log_p = torch.tensor(list(log_probabilities.values()), dtype=torch.float64).clamp(max=-1e-12)
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    deviations = memberships.std(0, unbiased=False)
    inputs = (memberships - memberships.mean(0)) / deviations
    outputs = log_odds / num_tokens
    weights = lasso(inputs, outputs - outputs.mean(), penalty)
    return (weights / deviations * num_tokens).tolist()


def lasso(inputs: Tensor, outputs: Tensor, penalty: float) -> Tensor:
    """Returns the weights w that minimize `|outputs - inputs w|^2 / 2n + penalty |w|_1` by coordinate descent.

    Args:
        inputs: Standardized inputs [n, K]: the mean of each column is 0 and its variance is 1.
        outputs: Outputs [n] with mean 0.
        penalty: Weight of the penalty.
    """
    weights = inputs.new_zeros(inputs.shape[1])
    residual = outputs.clone()
    for _ in range(MAX_SWEEPS):
        largest_step = 0.0
        for column in range(len(weights)):
            correlation = inputs[:, column] @ residual / len(residual) + weights[column]
            weight = correlation.sign() * (correlation.abs() - penalty).clamp(min=0)
            step = weight - weights[column]
            residual -= step * inputs[:, column]
            weights[column] = weight
            largest_step = max(largest_step, float(step.abs()))
        if largest_step < TOLERANCE:
            break
    return weights
