"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.policy.base import PolicyObjective
from lightning_softprompt.objectives.policy.estimators import (
    clipped_losses,
    is_clipped,
    leave_one_out_advantages,
    ratios,
    sum_tokens,
)
from lightning_softprompt.objectives.policy.experience import Experience
from lightning_softprompt.objectives.policy.logs import change_logs, divergence_logs


@final
@dataclass(frozen=True)
class RLOO(PolicyObjective):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740, section 2.3).

    The advantage of an answer is its reward minus the mean reward of the other answers to its question. The divergence
    from the reference is part of the reward: the log-probability of an answer minus that of the reference, times `kl`.
    With several steps for a rollout, the probability ratio of each answer is clipped.

    Args:
        clip_low: How far below 1 the probability ratio of an answer still changes the loss.
        clip_high: How far above 1.

    Raises:
        ValueError: See `PolicyObjective`.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    @property
    def requires_old_logprobs(self) -> bool:
        """See `PolicyObjective.requires_old_logprobs`; rewards contain them if there is a reference."""
        return super().requires_old_logprobs or bool(self.kl)

    def add_advantages(self, lm: PromptedLM, experience: Experience) -> None:
        """Sets the advantages of answers, the same for each of their tokens."""
        assert experience.groups is not None
        rewards = experience.rewards
        if experience.old_logprobs is not None:
            k1 = self.divergences(experience.old_logprobs, experience).k1
            rewards = rewards - self.kl_weight * sum_tokens(k1, experience.answer_mask)
        advantages = leave_one_out_advantages(rewards, experience.groups)
        experience.advantages = advantages[:, None] * experience.answer_mask

    def learn(self, lm: PromptedLM, experience: Experience) -> Outcome:
        """Computes the loss, averaged over answers."""
        mask = experience.answer_mask
        logprobs, entropies = lm.target_scores(experience, self.temperature)
        old_logprobs = logprobs.detach() if experience.old_logprobs is None else experience.old_logprobs
        advantages = experience.advantages[:, :1]  # of the first token, the same as of all others
        ratio = ratios(sum_tokens(logprobs, mask), sum_tokens(old_logprobs, mask))[:, None]
        clipped = is_clipped(ratio, advantages, self.clip_low, self.clip_high)
        losses = clipped_losses(ratio, advantages, self.clip_low, self.clip_high)
        logs = change_logs(logprobs, old_logprobs, entropies, ratio, clipped, mask)
        if self.kl:
            logs |= divergence_logs(self.divergences(logprobs.detach(), experience), mask)
        return Outcome(losses.sum() / mask.any(1).sum().clamp(min=1), logs)
