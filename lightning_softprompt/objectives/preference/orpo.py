"""Odds ratio preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import pairs_of
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.preference.losses import (
    check_positive,
    count_questions,
    log_odds,
    nll_of_better,
    pair_logs,
    token_means,
)


@final
@dataclass(frozen=True)
class ORPO(Objective):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

    The loss is -m_w - l log sigmoid(o_w - o_l), where m is the mean log-probability per token of an answer, and o the
    log-odds m - log(1 - e^m) of the better answer y_w or the worse answer y_l. It has no reference, and learns the
    better answers at the same time, so that it can start without supervised training.

    Args:
        weight: l, the weight of the odds ratio.

    Raises:
        ValueError: If the weight is not above 0.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over questions."""
        pairs = pairs_of(batch)
        logprobs = lm.logprobs(batch)
        means = token_means(logprobs, batch)
        nll = nll_of_better(pairs, logprobs, batch)
        ratio_loss = pairs.mean(-logsigmoid(pairs.differences(log_odds(means))))
        logs = pair_logs(pairs, self.weight * means, logprobs)
        logs |= {"sft_loss": nll.detach(), "odds_ratio_loss": ratio_loss.detach()}
        return Outcome(nll + self.weight * ratio_loss, logs)

    def with_reward(self, lm: PromptedLM) -> PromptedLM:
        """Returns the language model with the reward of answers."""
        return lm.with_reward(self.reward)

    def reward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the reward [B] of each answer, l m."""
        return self.weight * token_means(lm.logprobs(batch), batch)

    def count(self, batch: Batch) -> Tensor:
        """Counts the questions."""
        return count_questions(batch)
