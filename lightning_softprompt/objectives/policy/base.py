"""`PolicyObjective`: base class of objectives that learn from sampled answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.answers import (
    answer_lengths,
    answer_texts,
    are_finished,
    draw_seed,
    generate_answers,
)
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.frozen_role import START, load_role
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.policy.estimators import Divergences, estimate_divergences, has_equal_rewards
from lightning_softprompt.objectives.reference_checks import check_reference
from lightning_softprompt.rewards.base import Reward


@dataclass(frozen=True)
class SampledAnswers:
    """Answers of the policy with everything that is computed without gradient.

    Args:
        batch: The questions with their answers, B rows with U tokens.
        groups: The number of the question [B] of each answer.
        mask: Which tokens [B, U] belong to answers.
        rewards: The reward [B] of each answer.
        reference: Log-probabilities [B, U] of the reference; None if the objective uses none.
    """

    batch: Batch
    groups: Tensor
    mask: Tensor
    rewards: Tensor
    reference: Tensor | None


@dataclass(frozen=True)
class PolicyObjective(Objective):
    """An objective that samples answers to the questions of a batch and learns from their rewards.

    Each step samples new answers and uses them once. The reference, from which the policy must not move too far, shares
    the backbone of the run.

    Args:
        reward: The reward that is increased.
        answers: Number of answers to each question.
        max_new_tokens: Maximum tokens of an answer.
        kl: Weight of the divergence from the reference; 0 for no reference.
        reference: `start`, the prompt of the run before its first step; `bare`, the backbone without a prompt; or the
            `prompt.safetensors` or checkpoint of a trained prompt.

    Raises:
        ValueError: If a number is out of range.
    """

    reward: Reward
    answers: int = 8
    max_new_tokens: int = 64
    kl: float = 0.0
    reference: str = START

    def __post_init__(self) -> None:
        if self.answers < 2 or self.max_new_tokens < 1 or self.kl < 0:
            raise ValueError(
                f"answers must be at least 2, max_new_tokens at least 1 and kl at least 0, got {self.answers}, "
                f"{self.max_new_tokens} and {self.kl}"
            )

    has_data_loss: ClassVar[bool] = False  # the loss is that of sampled answers, not of the answers in the data

    @property
    def compares_with_start(self) -> bool:
        """Whether the reference is the start of the run."""
        return bool(self.kl) and self.reference == START

    def check_method(self, method: str, changes_backbone: bool, noise: Sequence[str]) -> None:
        """See `Objective.check_method`."""
        check_reference(type(self).__name__, self.reference, method, changes_backbone, noise)

    def with_reward(self, lm: PromptedLM) -> PromptedLM:
        """Returns the language model with the reward, which evaluations report."""
        return lm.with_reward(self.reward)

    def count(self, batch: Batch) -> Tensor:
        """Counts the questions."""
        return torch.tensor(len(batch), device=batch.mask.device)

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Samples answers and computes the loss."""
        sampled = self.sample(lm, batch)
        outcome = self.learn(lm, sampled)
        return Outcome(outcome.loss, {**self._describe(lm, sampled), **outcome.logs})

    @abstractmethod
    def learn(self, lm: PromptedLM, sampled: SampledAnswers) -> Outcome:
        """Computes the loss of sampled answers."""

    @torch.no_grad()
    def sample(self, lm: PromptedLM, questions: Batch) -> SampledAnswers:
        """Samples answers, and computes their rewards and the log-probabilities of the reference.

        Raises:
            ValueError: If a reward is not a finite number.
        """
        decoding = Decoding(do_sample=True, max_new_tokens=self.max_new_tokens, seed=draw_seed())
        with decoding.drawing():
            batch = generate_answers(lm, questions, self.answers, decoding)
        rewards = self.reward(lm, batch).float()
        if not rewards.isfinite().all():
            text = answer_texts(lm, batch)[int((~rewards.isfinite()).nonzero()[0])]
            raise ValueError(f"{type(self.reward).__name__} is not a finite number for the answer {text!r}")
        assert batch.groups is not None
        reference = self._reference_logprobs(lm, batch) if self.kl else None
        return SampledAnswers(batch, batch.groups, batch.targets != IGNORE, rewards, reference)

    def _reference_logprobs(self, lm: PromptedLM, batch: Batch) -> Tensor:
        if "role" not in self._state:
            self._state["role"] = load_role(self.reference, lm.backbone)
        with self._state["role"].on(lm) as (frozen, _):
            logprobs: Tensor = frozen.logprobs(batch)
        return logprobs

    def divergence_terms(self, logprobs: Tensor, sampled: SampledAnswers) -> Divergences:
        """Returns estimates [B, U] of the divergence from the reference; zeros without one."""
        reference = logprobs.detach() if sampled.reference is None else sampled.reference
        return estimate_divergences(logprobs, reference)

    @torch.no_grad()
    def _describe(self, lm: PromptedLM, sampled: SampledAnswers) -> dict[str, Tensor]:
        """Returns values to log."""
        return {
            "reward": sampled.rewards.mean(),
            "reward_std": sampled.rewards.std(),
            "equal_reward_share": has_equal_rewards(sampled.rewards, sampled.groups).float().mean(),
            "answer_tokens": answer_lengths(sampled.batch).float().mean(),
            "finished_share": are_finished(lm, sampled.batch).float().mean(),
        }

    @cached_property
    def _state(self) -> dict[str, Any]:
        return {}


def divergence_logs(divergences: Divergences, mask: Tensor) -> dict[str, Tensor]:
    """Returns the mean divergence per answer to log. `kl`, the estimate without bias, can be negative in a batch."""
    k1, k3 = (values.detach().where(mask, 0).sum(1).mean() for values in (divergences.k1, divergences.k3))
    return {"kl": k1, "kl_k3": k3}
