"""Group relative policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.policy.base import PolicyObjective
from lightning_softprompt.objectives.policy.estimators import (
    Average,
    Scale,
    average_tokens,
    clipped_losses,
    group_advantages,
    is_clipped,
    ratios,
)
from lightning_softprompt.objectives.policy.experience import Experience
from lightning_softprompt.objectives.policy.logs import change_logs, divergence_logs


@final
@dataclass(frozen=True)
class GRPO(PolicyObjective):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, equation 3).

    The advantage of an answer is its reward minus the mean reward of the answers to its question. With several steps
    for a rollout, the probability ratio of each token is clipped. The divergence from the reference is a term of the
    loss: k3 times the probability ratio, whose gradient is that of KL(policy || reference).

    Args:
        scale: What advantages are divided by: the standard deviation of the rewards of the `group`, that of the
            `batch`, or nothing (`none`, Liu et al. 2025, arXiv 2503.20783).
        average: How token losses are averaged: over all `tokens` (Yu et al. 2025, arXiv 2503.14476), over the tokens of
            each answer and then over answers (`rows`, as in the paper), or by a `constant` number (Liu et al. 2025).
        clip_low: How far below 1 a probability ratio still changes the loss.
        clip_high: How far above 1 (0.28 in Yu et al. 2025).

    Raises:
        ValueError: See `PolicyObjective`.
    """

    scale: Scale = "group"
    average: Average = "tokens"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def count(self, batch: Batch) -> Tensor:
        """Counts the tokens or answers that the loss averages over."""
        mask = cast(Experience, batch).answer_mask
        return mask.sum() if self.average == "tokens" else mask.any(1).sum()

    def add_advantages(self, lm: PromptedLM, experience: Experience) -> None:
        """Sets the advantages of answers, the same for each of their tokens."""
        assert experience.groups is not None
        advantages = group_advantages(experience.rewards, experience.groups, self.scale)
        experience.advantages = advantages[:, None] * experience.answer_mask

    def learn(self, lm: PromptedLM, experience: Experience) -> Outcome:
        """Computes the loss."""
        mask, advantages = experience.answer_mask, experience.advantages
        logprobs, entropies = lm.target_scores(experience, self.temperature)
        old_logprobs = logprobs.detach() if experience.old_logprobs is None else experience.old_logprobs
        ratio = ratios(logprobs, old_logprobs)
        clipped = is_clipped(ratio, advantages, self.clip_low, self.clip_high)
        losses = clipped_losses(ratio, advantages, self.clip_low, self.clip_high)
        logs = change_logs(logprobs, old_logprobs, entropies, ratio, clipped, mask)
        if self.kl:
            divergences = self.divergences(logprobs, experience)
            losses = losses + self.kl_weight * ratio * divergences.k3
            logs |= divergence_logs(divergences, mask)
        return Outcome(average_tokens(losses, mask, self.average, self.max_new_tokens), logs)
