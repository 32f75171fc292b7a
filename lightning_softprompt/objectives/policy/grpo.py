"""Group relative policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.policy.base import PolicyObjective, SampledAnswers, divergence_logs
from lightning_softprompt.objectives.policy.estimators import Average, Scale, average_tokens, group_advantages, ratios


@final
@dataclass(frozen=True)
class GRPO(PolicyObjective):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, equation 3).

    The advantage of an answer is its reward minus the mean reward of the answers to its question. Answers are used for
    one step, so that probability ratios are 1 and clipping has no effect. The divergence from the reference is a term
    of the loss: k3 times the probability ratio, whose gradient is that of KL(policy || reference).

    Args:
        reward: See `PolicyObjective`.
        answers: See `PolicyObjective`.
        max_new_tokens: See `PolicyObjective`.
        kl: See `PolicyObjective`.
        reference: See `PolicyObjective`.
        scale: What advantages are divided by: the standard deviation of the rewards of the `group`, that of the
            `batch`, or nothing (`none`, Liu et al. 2025, arXiv 2503.20783).
        average: How token losses are averaged: over all `tokens` (Yu et al. 2025, arXiv 2503.14476), over the tokens of
            each answer and then over answers (`rows`, as in the paper), or by a `constant` number (Liu et al. 2025).

    Raises:
        ValueError: See `PolicyObjective`.
    """

    scale: Scale = "group"
    average: Average = "tokens"

    def learn(self, lm: PromptedLM, sampled: SampledAnswers) -> Outcome:
        """Computes the loss."""
        logprobs = lm.logprobs(sampled.batch)
        advantages = group_advantages(sampled.rewards, sampled.groups, self.scale)
        ratio = ratios(logprobs, logprobs.detach())
        losses = -ratio * advantages[:, None]
        logs = {}
        if self.kl:
            divergences = self.divergence_terms(logprobs, sampled)
            losses = losses + self.kl * ratio * divergences.k3
            logs = divergence_logs(divergences, sampled.mask)
        return Outcome(average_tokens(losses, sampled.mask, self.average, self.max_new_tokens), logs)
