"""Losses of pairs of answers, and quantities of log-probabilities, that several objectives share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_softprompt.core.answer_pairs import AnswerPairs
from lightning_softprompt.core.types import IGNORE, Batch


def preference_losses(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns -(1 - e) log sigmoid(x) - e log sigmoid(-x) for logits x and label smoothing e.

    Args:
        logits: How much better the preferred answers are [N].
        label_smoothing: Probability that a pair is labeled the wrong way round.

    >>> preference_losses(torch.zeros(1), 0.1)
    tensor([0.6931])
    """
    losses = -logsigmoid(logits)
    if not label_smoothing:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-logits)


def robust_losses(logits: Tensor, label_smoothing: float) -> Tensor:
    """Returns the unbiased estimate of the loss without wrong labels (Chowdhury et al. 2024, arXiv 2403.00409).

    It is (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e).

    Args:
        logits: How much better the preferred answers are [N].
        label_smoothing: e, the probability that a pair is labeled the wrong way round, below one half.
    """
    of_right, of_wrong = -logsigmoid(logits), -logsigmoid(-logits)
    return ((1 - label_smoothing) * of_right - label_smoothing * of_wrong) / (1 - 2 * label_smoothing)


def token_means(logprobs: Tensor, batch: Batch) -> Tensor:
    """Returns the mean log-probability [B] of the targets of each row, from log-probabilities [B, U]."""
    counts = (batch.targets != IGNORE).sum(1)
    return logprobs.sum(1) / counts.clamp(min=1)


def log_odds(means: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) for log p, without the rounding error of 1 - p.

    >>> log_odds(torch.tensor([0.5]).log())
    tensor([0.])
    """
    log_p = means.clamp(max=-torch.finfo(means.dtype).eps)
    is_large = log_p > -math.log(2)
    # both forms of log(1 - p) are finite everywhere, so that neither causes a gradient of NaN
    log_rest = torch.where(is_large, (-torch.expm1(log_p)).log(), torch.log1p(-log_p.exp()))
    return log_p - log_rest


def nll_of_better(pairs: AnswerPairs, logprobs: Tensor, batch: Batch) -> Tensor:
    """Returns the negative log-probability per token of the better answers, averaged over pairs and questions."""
    return pairs.mean(-token_means(logprobs, batch)[pairs.better])


def count_questions(batch: Batch) -> Tensor:
    """Counts the questions of a batch."""
    return torch.tensor(len(batch.units()), device=batch.mask.device)


def pair_logs(pairs: AnswerPairs, rewards: Tensor, logprobs: Tensor) -> dict[str, Tensor]:
    """Returns values to log: rewards and log-probabilities of better and worse answers.

    The log-probabilities of both answers usually fall, while their difference grows.

    Args:
        pairs: The pairs.
        rewards: The reward of each answer [B].
        logprobs: The log-probabilities [B, U] of their tokens.
    """
    sums = logprobs.sum(1)
    differences = pairs.differences(rewards)
    logs = {
        "reward_accuracy": pairs.mean((differences.sign() + 1) / 2),
        "reward_margin": pairs.mean(differences),
        "chosen_reward": pairs.mean(rewards[pairs.better]),
        "rejected_reward": pairs.mean(rewards[pairs.worse]),
        "chosen_logprob": pairs.mean(sums[pairs.better]),
        "rejected_logprob": pairs.mean(sums[pairs.worse]),
    }
    return {name: value.detach() for name, value in logs.items()}


def check_positive(name: str, value: float) -> None:
    """Checks that an argument is a finite number above 0.

    Raises:
        ValueError: If it is not.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_label_smoothing(value: float) -> None:
    """Checks that the share of wrong labels is at least 0 and below one half.

    Raises:
        ValueError: If it is not.
    """
    if not 0 <= value < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {value}")
