"""Simple preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import pairs_of
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.preference.losses import (
    check_label_smoothing,
    check_positive,
    count_questions,
    pair_logs,
    preference_losses,
    token_means,
)


@final
@dataclass(frozen=True)
class SimPO(Objective):
    """Simple preference optimization: -log sigmoid(b (m_w - m_l) - g) (Meng et al. 2024, arXiv 2405.14734, equation 6).

    m is the mean log-probability per token of the better answer y_w or the worse answer y_l, and b m the reward of an
    answer. It has no reference.

    Args:
        beta: b, the scale of rewards.
        gamma_ratio: g / b, the margin by which the mean log-probability of the better answer shall be larger.
        label_smoothing: The share of pairs that are assumed to be labeled the wrong way round.

    Raises:
        ValueError: If an argument is out of range.
    """

    beta: float = 2.0
    gamma_ratio: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_label_smoothing(self.label_smoothing)
        if self.gamma_ratio < 0:
            raise ValueError(f"gamma_ratio must be at least 0, got {self.gamma_ratio}")

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over questions."""
        pairs = pairs_of(batch)
        logprobs = lm.logprobs(batch)
        rewards = self.beta * token_means(logprobs, batch)
        logits = pairs.differences(rewards) - self.beta * self.gamma_ratio
        loss = pairs.mean(preference_losses(logits, self.label_smoothing))
        return Outcome(loss, pair_logs(pairs, rewards, logprobs))

    def with_reward(self, lm: PromptedLM) -> PromptedLM:
        """Returns the language model with the reward of answers."""
        return lm.with_reward(self.reward)

    def reward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the reward [B] of each answer, b m."""
        return self.beta * token_means(lm.logprobs(batch), batch)

    def count(self, batch: Batch) -> Tensor:
        """Counts the questions."""
        return count_questions(batch)
