"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.policy.base import PolicyObjective, SampledAnswers, divergence_logs
from lightning_softprompt.objectives.policy.estimators import leave_one_out_advantages


@final
@dataclass(frozen=True)
class RLOO(PolicyObjective):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740, section 2.3).

    The advantage of an answer is its reward minus the mean reward of the other answers to its question. The divergence
    from the reference is part of the reward: the log-probability of an answer minus that of the reference, times `kl`.

    Args:
        reward: See `PolicyObjective`.
        answers: See `PolicyObjective`.
        max_new_tokens: See `PolicyObjective`.
        kl: See `PolicyObjective`.
        reference: See `PolicyObjective`.

    Raises:
        ValueError: See `PolicyObjective`.
    """

    def learn(self, lm: PromptedLM, sampled: SampledAnswers) -> Outcome:
        """Computes the loss, averaged over answers."""
        logprobs = lm.logprobs(sampled.batch)
        rewards, logs = sampled.rewards, {}
        if self.kl:
            divergences = self.divergence_terms(logprobs.detach(), sampled)
            rewards = rewards - self.kl * divergences.k1.where(sampled.mask, 0).sum(1)
            logs = divergence_logs(divergences, sampled.mask)
        advantages = leave_one_out_advantages(rewards, sampled.groups)
        return Outcome(-(advantages * logprobs.where(sampled.mask, 0).sum(1)).mean(), logs)
