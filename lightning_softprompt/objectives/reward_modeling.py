"""Training of reward models on preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import pairs_of
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.preference.losses import (
    check_label_smoothing,
    count_questions,
    nll_of_better,
    preference_losses,
)


@final
@dataclass(frozen=True)
class RewardModeling(Objective):
    """The Bradley-Terry loss of scores: -log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2 (Stiennon et al. 2020).

    r_w and r_l are the scores of the better and the worse answer by the readout `RewardHead`, and m is the margin of
    the pair if the data have margins (Touvron et al. 2023, arXiv 2307.09288). The answers of a ranking form all pairs,
    whose losses are averaged for each question.

    Args:
        centering: c, which keeps scores around 0 (Eisenstein et al. 2023, arXiv 2312.09244).
        label_smoothing: Share of the pairs that are assumed to be labeled the wrong way round.
        sft_weight: Weight of the cross entropy per token of the better answers, so that the prompt also generates.

    Raises:
        ValueError: If label_smoothing is not at least 0 and below one half, or a weight is negative.
    """

    centering: float = 0.0
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        if self.centering < 0 or self.sft_weight < 0:
            raise ValueError(f"centering and sft_weight must be at least 0, got {self.centering}, {self.sft_weight}")

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over questions.

        Raises:
            ValueError: If there is no reward head, or the rows are not answers to compare.
        """
        if not lm.has_readout:
            raise ValueError("RewardModeling trains a reward head; set --model.readout to RewardHead")
        pairs = pairs_of(batch)
        scores = lm.answer_scores(batch)
        differences = pairs.differences(scores)
        losses = preference_losses(differences - pairs.margins, self.label_smoothing)
        loss = pairs.mean(losses)
        logs = {
            "reward_accuracy": pairs.mean((differences.sign() + 1) / 2),
            "reward_margin": pairs.mean(differences),
            "reward_mean": scores.mean(),
        }
        if self.centering:
            sums = scores[pairs.better] + scores[pairs.worse]
            loss = loss + self.centering * pairs.mean(sums**2)
        if self.sft_weight:
            nll = nll_of_better(pairs, lm.logprobs(batch), batch)
            logs["sft_loss"] = nll
            loss = loss + self.sft_weight * nll
        return Outcome(loss, {name: value.detach() for name, value in logs.items()})

    def count(self, batch: Batch) -> Tensor:
        """Counts the questions."""
        return count_questions(batch)
