"""Identity preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import pairs_of
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Outcome
from lightning_softprompt.objectives.preference.losses import check_positive, pair_logs, token_means
from lightning_softprompt.objectives.preference.reference import ReferencedObjective


@final
@dataclass(frozen=True)
class IPO(ReferencedObjective):
    """Identity preference optimization: (h - 1 / (2 b))^2 (Azar et al. 2023, arXiv 2310.12036, equation 17).

    h is as in `DPO`, of log-probabilities that are averaged over the tokens of an answer. It stays finite where all
    labels agree, in contrast to DPO.

    Args:
        beta: b. The larger, the closer the policy stays to the reference.
        average: Whether log-probabilities are means over `tokens` of an answer, as by the authors, or `sums`.
        reference: `start`, the prompt of the run before its first step; `bare`, the backbone without a prompt; or the
            `prompt.safetensors` or checkpoint of a trained prompt.
        disk: Limit of the cache of reference log-probabilities on disk in MiB, for later runs; 0 caches in memory only.

    Raises:
        ValueError: If beta is not above 0.
    """

    beta: float = 0.1
    average: Literal["tokens", "sums"] = "tokens"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over questions."""
        pairs = pairs_of(batch)
        logprobs = lm.logprobs(batch)
        ratios = self._ratios(lm, logprobs, batch)
        distances = pairs.differences(ratios) - 1 / (2 * self.beta)
        return Outcome(pairs.mean(distances**2), pair_logs(pairs, self.beta * ratios, logprobs))

    def _ratios(self, lm: PromptedLM, logprobs: Tensor, batch: Batch) -> Tensor:
        ratios = self.log_ratios(lm, logprobs, batch)
        return token_means(ratios, batch) if self.average == "tokens" else ratios.sum(1)

    def reward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the implicit reward [B] of each answer."""
        return self.beta * self._ratios(lm, lm.logprobs(batch), batch)
