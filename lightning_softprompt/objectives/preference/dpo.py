"""Direct preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import pairs_of
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.preference.losses import (
    check_label_smoothing,
    check_positive,
    nll_of_better,
    pair_logs,
    preference_losses,
    robust_losses,
)
from lightning_softprompt.objectives.preference.reference import ReferencedObjective


@final
@dataclass(frozen=True)
class DPO(ReferencedObjective):
    """Direct preference optimization: -log sigmoid(b h) (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    h is log p(y_w) - log r(y_w) - log p(y_l) + log r(y_l) for the policy p, the reference r, the better answer y_w and
    the worse answer y_l. Log-probabilities are sums over the tokens of an answer, with the token that ends it. The
    implicit reward of an answer is b (log p(y) - log r(y)).

    Args:
        beta: b. The larger, the closer the policy stays to the reference.
        label_smoothing: e, the share of pairs that are assumed to be labeled the wrong way round (conservative DPO).
        robust: Whether to use the unbiased estimate of the loss without these labels (Chowdhury et al. 2024,
            arXiv 2403.00409).
        sft_weight: Weight of the cross entropy per token of the better answers (Pang et al. 2024, arXiv 2404.19733).
        reference: `start`, the prompt of the run before its first step; `bare`, the backbone without a prompt; or the
            `prompt.safetensors` or checkpoint of a trained prompt.
        disk: Limit of the cache of reference log-probabilities on disk in MiB, for later runs; 0 caches in memory only.

    Raises:
        ValueError: If an argument is out of range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    robust: bool = False
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_label_smoothing(self.label_smoothing)
        if self.robust and not self.label_smoothing:
            raise ValueError("robust requires label_smoothing, the share of pairs that are labeled the wrong way round")

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over questions."""
        pairs = pairs_of(batch)
        logprobs = lm.logprobs(batch)
        rewards = self.beta * self.log_ratios(lm, logprobs, batch).sum(1)
        losses = robust_losses if self.robust else preference_losses
        loss = pairs.mean(losses(pairs.differences(rewards), self.label_smoothing))
        if self.sft_weight:
            loss = loss + self.sft_weight * nll_of_better(pairs, logprobs, batch)
        return Outcome(loss, pair_logs(pairs, rewards, logprobs))

    def reward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the implicit reward [B] of each answer."""
        return self.beta * self.log_ratios(lm, lm.logprobs(batch), batch).sum(1)
