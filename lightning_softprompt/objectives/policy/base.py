"""`PolicyObjective`: base class of objectives that learn from sampled answers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import numpy as np
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
from lightning_softprompt.distributed.sharding import sum_over_processes, wait_for_layers
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.policy.answer_rows import describe_answers
from lightning_softprompt.objectives.policy.estimators import (
    Divergences,
    adapt_weight,
    estimate_divergences,
    has_equal_rewards,
    sum_tokens,
)
from lightning_softprompt.objectives.policy.experience import Experience
from lightning_softprompt.objectives.reference_checks import check_reference
from lightning_softprompt.objectives.rollout_work import RolloutWork
from lightning_softprompt.rewards.base import Reward

KL_WEIGHT = "kl_weight"  # name of the adapted weight in logs and checkpoints


@dataclass(frozen=True)
class PolicyObjective(Objective):
    """An objective that samples answers to the questions of a batch and learns from their rewards.

    A rollout samples answers to one batch and learns from them in `epochs` passes over `minibatches` parts, of one
    training step each; the order of parts is random. Answers are sampled from all tokens. The reference, from which the
    policy must not move too far, shares the backbone of the run.

    Args:
        reward: The reward that is increased.
        answers: Number of answers to each question.
        max_new_tokens: Maximum tokens of an answer.
        temperature: Divides the logits, in sampling and in all log-probabilities of policy and reference.
        epochs: How often each answer is learned from.
        minibatches: Number of parts of a rollout, each with all answers to some of its questions; at most the number of
            questions of a batch.
        max_kl: Divergence per answer from the policy that sampled the answers above which the remaining steps of a
            rollout are skipped, in nats; null for no limit. Skipped steps count as steps of the training.
        kl: Weight of the divergence from the reference; 0 for no reference.
        kl_target: Divergence per answer from the reference to which the weight is adapted, in nats; null for a constant
            weight. After each rollout, the weight is multiplied by 1 + clip(d / kl_target - 1, -0.2, 0.2) n /
            kl_horizon for the divergence d of n answers (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).
        kl_horizon: Number of answers in which the weight changes by at most 20 %.
        reference: `start`, the prompt of the run before its first step; `bare`, the backbone without a prompt; or the
            `prompt.safetensors` or checkpoint of a trained prompt.
        learn_unfinished: Whether to learn from answers that reach `max_new_tokens` before they end. If not, their
            tokens count neither in the sum nor in the number of losses (Yu et al. 2025, arXiv 2503.14476, section 3.4).

    Raises:
        ValueError: If a number is out of range.
    """

    reward: Reward
    answers: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    epochs: int = 1
    minibatches: int = 1
    max_kl: float | None = None
    kl: float = 0.0
    kl_target: float | None = None
    kl_horizon: int = 10000
    reference: str = START
    learn_unfinished: bool = True

    has_data_loss: ClassVar[bool] = False  # the loss is that of sampled answers, not of the answers in the data
    min_answers: ClassVar[int] = 2  # answers to a question that the advantages require

    def __post_init__(self) -> None:
        minima = {"answers": self.min_answers, "max_new_tokens": 1, "epochs": 1, "minibatches": 1, "kl_horizon": 1}
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} of {type(self).__name__} must be at least {least}, got {getattr(self, name)}")
        if self.kl < 0:
            raise ValueError(f"kl of {type(self).__name__} must be at least 0, got {self.kl}")
        for name in ("temperature", "max_kl", "kl_target"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} of {type(self).__name__} must be above 0, got {value}")
        if self.kl_target is not None and not self.kl:
            raise ValueError("kl_target adapts the weight kl, which must then be above 0")

    @property
    def steps_per_batch(self) -> int:
        """Number of training steps of a rollout."""
        return self.epochs * self.minibatches

    @property
    def max_policy_change(self) -> float | None:
        """See `Objective.max_policy_change`."""
        return self.max_kl

    @property
    def compares_with_start(self) -> bool:
        """Whether the reference is the start of the run."""
        return bool(self.kl) and self.reference == START

    @property
    def requires_old_logprobs(self) -> bool:
        """Whether log-probabilities of the policy that sampled the answers are computed before the first step."""
        return self.steps_per_batch > 1 or self.kl_target is not None

    def rollout_work(self, questions: int, tokens: int) -> RolloutWork:
        """See `Objective.rollout_work`. The answers to a question share its tokens."""
        once = questions * (tokens + self.answers * self.max_new_tokens)
        passes = {"sampling": once}
        if self.requires_old_logprobs:
            passes["old log-probabilities"] = once
        if self.kl:
            passes["reference"] = once
        passes["learning"] = 2 * self.epochs * once
        learned_rows = math.ceil(questions / self.minibatches) * self.answers
        return RolloutWork(questions, self.answers, self.max_new_tokens, self.steps_per_batch, learned_rows, passes)

    def check_method(self, method: str, changes_backbone: bool, noise: Sequence[str]) -> None:
        """See `Objective.check_method`."""
        check_reference(type(self).__name__, self.reference, method, changes_backbone, noise)

    def with_reward(self, lm: PromptedLM) -> PromptedLM:
        """Returns the language model with the reward, which evaluations report."""
        return lm.with_reward(self.reward, self.reward.explain)

    def count(self, batch: Batch) -> Tensor:
        """Counts the answers that are learned from."""
        return cast(Experience, batch).answer_mask.any(1).sum()

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss of an experience, or of answers that are sampled for a batch."""
        experience = batch if isinstance(batch, Experience) else self.begin(lm, batch)
        outcome = self.learn(lm, experience)
        return Outcome(outcome.loss, {**self._describe(lm, experience), **outcome.logs})

    @abstractmethod
    def learn(self, lm: PromptedLM, experience: Experience) -> Outcome:
        """Computes the loss of an experience or of a part of it."""

    @abstractmethod
    def add_advantages(self, lm: PromptedLM, experience: Experience) -> None:
        """Sets the advantages, and what else learning requires, without gradient."""

    @torch.no_grad()
    def begin(self, lm: PromptedLM, batch: Batch) -> Experience:
        """Samples answers to questions and computes everything that does not change while learning from them.

        Raises:
            ValueError: If a reward is not a finite number.
        """
        sampling = Decoding(
            do_sample=True, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=draw_seed()
        )
        with sampling.drawing():
            answered = generate_answers(lm, batch, self.answers, sampling)
        mask = answered.targets != IGNORE
        if not self.learn_unfinished:
            mask = mask & are_finished(lm, answered)[:, None]
        experience = Experience.of(answered, mask, *self._rewards(lm, answered))
        if self.requires_old_logprobs:
            experience.old_logprobs = lm.target_scores(experience, self.temperature).logprobs
        if self.kl:
            experience.reference_logprobs = self._reference_logprobs(lm, experience)
        self.add_advantages(lm, experience)
        self._adapt_weight(lm, experience)
        wait_for_layers(lm.backbone)
        return experience

    def _rewards(self, lm: PromptedLM, answered: Batch) -> tuple[Tensor, Tensor]:
        """Returns the reward [B] of each answer, and its parts [B, parts]."""
        rewards, parts = self.reward.explain(lm, answered)
        rewards = rewards.float()
        if not rewards.isfinite().all():
            text = answer_texts(lm, answered)[int((~rewards.isfinite()).nonzero()[0])]
            raise ValueError(f"{type(self.reward).__name__} is not a finite number for the answer {text!r}")
        columns = [parts[name].float() for name in self.reward.part_names]
        return rewards, torch.stack(columns, 1) if columns else rewards.new_empty(len(rewards), 0)

    def _reference_logprobs(self, lm: PromptedLM, experience: Experience) -> Tensor:
        if "role" not in self._state:
            self._state["role"] = load_role(self.reference, lm.backbone)
        with self._state["role"].on(lm) as (frozen, _):
            logprobs: Tensor = frozen.target_scores(experience, self.temperature).logprobs
        return logprobs

    def select(self, rows: Batch, number: int, turn: int) -> Batch:
        """Returns the rows of one step: all answers to some of the questions.

        The order depends on the seed of the run, the number of the rollout and the epoch. A batch with fewer questions
        than minibatches, as at the end of the data, has one question in each part, and some parts twice.
        """
        if self.minibatches == 1:
            return rows
        epoch, part = divmod(turn, self.minibatches)
        units = rows.units()
        order = np.random.default_rng((torch.initial_seed(), number, epoch)).permutation(len(units))
        parts = np.array_split(order, min(self.minibatches, len(units)))
        selected = parts[part % len(parts)]
        return rows.only([row for unit in selected for row in units[unit]])

    def divergences(self, logprobs: Tensor, experience: Experience) -> Divergences:
        """Returns estimates [B, U] of the divergence from the reference; zeros without one."""
        reference = experience.reference_logprobs
        return estimate_divergences(logprobs, logprobs.detach() if reference is None else reference)

    @property
    def kl_weight(self) -> float:
        """The current weight of the divergence from the reference."""
        return float(self._state.get(KL_WEIGHT, self.kl))

    def _adapt_weight(self, lm: PromptedLM, experience: Experience) -> None:
        if self.kl_target is None:
            return
        assert experience.old_logprobs is not None
        k1 = self.divergences(experience.old_logprobs, experience).k1
        per_answer = sum_tokens(k1, experience.answer_mask)
        terms = torch.stack([per_answer.sum(), per_answer.new_tensor(float(len(per_answer)))])
        total, count = sum_over_processes(terms, lm.backbone).tolist()
        weight = adapt_weight(self.kl_weight, total / count, self.kl_target, count / self.kl_horizon)
        self._state[KL_WEIGHT] = weight

    def state(self) -> dict[str, float]:
        """Returns the adapted weight of the divergence."""
        return {} if self.kl_target is None else {KL_WEIGHT: self.kl_weight}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Sets the adapted weight of the divergence."""
        if self.kl_target is not None:
            self._state[KL_WEIGHT] = state[KL_WEIGHT]

    def describe_rows(self, lm: PromptedLM, rows: Batch) -> Sequence[Mapping[str, Any]]:
        """Returns the answers of a step with their rewards."""
        return describe_answers(lm, cast(Experience, rows), self.reward.part_names)

    @torch.no_grad()
    def _describe(self, lm: PromptedLM, experience: Experience) -> dict[str, Tensor]:
        """Returns values to log."""
        rewards = experience.rewards
        assert experience.groups is not None
        described = {
            "reward": rewards.mean(),
            "reward_std": rewards.std() if len(rewards) > 1 else torch.zeros_like(rewards[0]),
            **{f"reward_{name}": experience.parts[:, i].mean() for i, name in enumerate(self.reward.part_names)},
            "equal_reward_share": has_equal_rewards(rewards, experience.groups).float().mean(),
            "answer_tokens": answer_lengths(experience).float().mean(),
            "finished_share": are_finished(lm, experience).float().mean(),
        }
        if self.kl_target is not None:
            described[KL_WEIGHT] = rewards.new_tensor(self.kl_weight)
        return described

    def total(self, lm: PromptedLM) -> Any:
        """Returns a function that sums a tensor over all processes."""
        return partial(sum_over_processes, backbone=lm.backbone)

    @cached_property
    def _state(self) -> dict[str, Any]:
        return {}
