"""Kahneman-Tversky optimization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.distributed.sharding import sum_over_processes
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.preference.losses import check_positive
from lightning_softprompt.objectives.preference.reference import ReferencedObjective


@final
@dataclass(kw_only=True)
class JudgedAnswers(Batch):
    """Answers with the divergence to which they are compared.

    Args:
        divergence: z, the same for each row [B].
    """

    divergence: Tensor


@final
@dataclass(frozen=True)
class KTO(ReferencedObjective):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8).

    An answer with a positive grade is desirable, and its loss is l_D (1 - sigmoid(b (d - z))); that of another answer
    is l_U (1 - sigmoid(b (z - d))). d is log p(y) - log r(y) for the policy p and the reference r. z estimates the
    divergence of both: the mean d of answers to other questions of the batch, at least 0 and without gradient. A batch
    requires two questions; with one, z is 0.

    Each answer is learned by itself, so that it does not matter which answers belong to the same question, nor how
    many there are. In training, z is the mean over the rows of all processes.

    Args:
        beta: b. The larger, the closer the policy stays to the reference.
        desirable: l_D.
        undesirable: l_U. l_D n_D / (l_U n_U) should be between 1 and 4/3 for n_D desirable and n_U undesirable answers.
        reference: `start`, the prompt of the run before its first step; `bare`, the backbone without a prompt; or the
            `prompt.safetensors` or checkpoint of a trained prompt.
        disk: Limit of the cache of reference log-probabilities on disk in MiB, for later runs; 0 caches in memory only.

    Raises:
        ValueError: If an argument is not above 0.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta", "desirable", "undesirable"):
            check_positive(name, getattr(self, name))

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over answers.

        Raises:
            ValueError: If the answers have no grades.
        """
        if batch.grades is None:
            raise ValueError("KTO requires answers that are preferred or rejected; use PreferenceDataModule")
        ratios = self.log_ratios(lm, lm.logprobs(batch), batch).sum(1)
        divergence = batch.divergence[0] if isinstance(batch, JudgedAnswers) else self._estimate(lm, batch)
        is_desirable = batch.grades > 0
        signs = torch.where(is_desirable, 1.0, -1.0)
        weights = torch.where(is_desirable, self.desirable, self.undesirable)
        losses = weights * (1 - torch.sigmoid(self.beta * signs * (ratios - divergence)))
        rewards = self.beta * ratios.detach()
        logs = {"kl": divergence, "reward_mean": rewards.mean()}
        return Outcome(losses.mean(), logs)

    def begin(self, lm: PromptedLM, batch: Batch) -> Batch:
        """Adds z to a batch of training, for which all processes work together."""
        divergence = self._estimate(lm, batch, partial(sum_over_processes, backbone=lm.backbone))
        return batch.extend(JudgedAnswers, divergence=divergence.expand(len(batch)))

    @torch.no_grad()
    def _estimate(self, lm: PromptedLM, batch: Batch, total: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Returns z.

        Args:
            lm: The policy.
            batch: The answers.
            total: Sums a tensor over all processes (default: there is only one).
        """
        ratios = self._mismatched_ratios(lm, batch)
        sums = torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])
        ratio_sum, count = total(sums)
        return (ratio_sum / count.clamp(min=1)).clamp(min=0)

    def _mismatched_ratios(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the log-ratios of answers to other questions; none if there is only one question."""
        units = batch.units()
        if len(units) < 2:
            return batch.targets.new_zeros(0, dtype=torch.float32)
        rows = batch.require_encoded()
        mismatched = []
        for number, unit in enumerate(units):
            others = units[(number + 1) % len(units)]
            for position, b in enumerate(unit):
                other = rows[others[position % len(others)]]
                mismatched.append(lm.backbone.codec.with_answer(rows[b], other.targets))
        tasks = None if batch.task_ids is None else batch.task_ids.cpu()
        pairs = lm.backbone.codec.collate(mismatched, task_ids=tasks).to(batch.targets.device)
        return self.log_ratios(lm, lm.logprobs(pairs), pairs).sum(1)

    def count(self, batch: Batch) -> Tensor:
        """Counts the answers."""
        return batch.mask.any(1).sum()

    def reward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the implicit reward [B] of each answer."""
        return self.beta * self.log_ratios(lm, lm.logprobs(batch), batch).sum(1)
