"""Proximal policy optimization with a value function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.policy.base import PolicyObjective
from lightning_softprompt.objectives.policy.estimators import (
    average_tokens,
    clipped_losses,
    clipped_value_losses,
    explained_variance,
    generalized_advantages,
    is_clipped,
    last_token_rewards,
    ratios,
    whiten,
)
from lightning_softprompt.objectives.policy.experience import Experience
from lightning_softprompt.objectives.policy.logs import change_logs, divergence_logs
from lightning_softprompt.objectives.policy.running_moments import RunningMoments


@final
@dataclass(frozen=True)
class PPO(PolicyObjective):
    """Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593).

    Each token is an action. Its reward is the divergence from the reference at this token times -`kl`; the last token
    of an answer also gets the reward of the answer. Advantages are those of GAE with the values of the readout, which
    must be `ValueHead`, and have mean 0 and variance 1 over all tokens of a rollout. Defaults follow Huang et al. 2024
    (arXiv 2403.17031). With several epochs, soft prompts require a smaller learning rate than with one, such as 0.001.

    Args:
        clip: How far from 1 a probability ratio still changes the loss.
        value_clip: How far from its old value a value is trained to move in a rollout.
        value_weight: Weight of the loss of the values.
        discount: Discount of a reward for each token before it.
        decay: The decay lambda of GAE: 1 uses rewards until the end of an answer, 0 the next value only.
        normalize_rewards: Whether rewards are shifted and scaled to mean 0 and variance 1 over all answers so far.

    Raises:
        ValueError: See `PolicyObjective`, or if an argument is out of range.
    """

    answers: int = 1
    epochs: int = 4
    kl: float = 0.05
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    discount: float = 1.0
    decay: float = 0.95
    normalize_rewards: bool = False

    min_answers: ClassVar[int] = 1
    requires_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "value_clip", "value_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of PPO must be above 0, got {getattr(self, name)}")
        for name in ("discount", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of PPO must be between 0 and 1, got {getattr(self, name)}")

    @property
    def requires_old_logprobs(self) -> bool:
        """Always: rewards contain them, and values are computed from the same states."""
        return True

    def count(self, batch: Batch) -> Tensor:
        """Counts the tokens that the loss averages over."""
        return cast(Experience, batch).answer_mask.sum()

    def add_advantages(self, lm: PromptedLM, experience: Experience) -> None:
        """Sets values, returns and whitened advantages of tokens."""
        mask = experience.answer_mask
        values = lm.values(experience).float().where(mask, 0)
        rewards = last_token_rewards(self._scale(lm, experience.rewards), mask)
        if self.kl:
            assert experience.old_logprobs is not None
            rewards = rewards - self.kl_weight * self.divergences(experience.old_logprobs, experience).k1
        advantages, returns = generalized_advantages(rewards, values, mask, self.discount, self.decay)
        experience.values, experience.returns = values, returns
        experience.advantages = whiten(advantages, mask, self.total(lm))

    def learn(self, lm: PromptedLM, experience: Experience) -> Outcome:
        """Computes the losses of policy and values, averaged over tokens."""
        mask, advantages = experience.answer_mask, experience.advantages
        old_logprobs, old_values, returns = experience.old_logprobs, experience.values, experience.returns
        assert old_logprobs is not None
        assert old_values is not None
        assert returns is not None
        logprobs, entropies = lm.target_scores(experience, self.temperature)
        ratio = ratios(logprobs, old_logprobs)
        policy_loss = average_tokens(clipped_losses(ratio, advantages, self.clip, self.clip), mask)
        values = lm.values(experience).float()
        value_loss = average_tokens(clipped_value_losses(values, old_values, returns, self.value_clip), mask)
        clipped = is_clipped(ratio, advantages, self.clip, self.clip)
        logs = change_logs(logprobs, old_logprobs, entropies, ratio, clipped, mask)
        logs |= {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "value_mean": average_tokens(old_values, mask),
            "return_mean": average_tokens(returns, mask),
            "explained_variance": explained_variance(old_values, returns, mask),
        }
        if self.kl:
            logs |= divergence_logs(self.divergences(logprobs, experience), mask)
        return Outcome(policy_loss + self.value_weight * value_loss, logs)

    def _scale(self, lm: PromptedLM, rewards: Tensor) -> Tensor:
        if not self.normalize_rewards:
            return rewards
        moments = self._moments.add(rewards, self.total(lm))
        self._state["moments"] = moments
        return (rewards - moments.mean) / (moments.std + 1e-8)

    @property
    def _moments(self) -> RunningMoments:
        moments: RunningMoments = self._state.get("moments", RunningMoments())
        return moments

    def state(self) -> dict[str, float]:
        """Returns the adapted weight of the divergence and the moments of rewards."""
        moments = vars(self._moments) if self.normalize_rewards else {}
        return {**super().state(), **moments}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Sets the values of `state`."""
        super().load_state(state)
        if self.normalize_rewards:
            self._state["moments"] = RunningMoments(state["count"], state["mean"], state["squares"])
