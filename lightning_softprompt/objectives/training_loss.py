"""The loss of a training step: objective, penalties of the method, and penalties on the soft tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.base import Objective
from lightning_softprompt.objectives.penalties import Penalty


@final
@dataclass
class TrainingLoss:
    """The sum of an objective and weighted penalties.

    Args:
        objective: The objective.
        weights: Weights of the penalties that the method reports with its prompt, by name.
        penalties: Penalties on the soft tokens of any method.
        method: Name of the method, for messages.
    """

    objective: Objective
    weights: dict[str, float]
    penalties: list[Penalty]
    method: str

    def __call__(self, lm: PromptedLM, batch: Batch, progress: float, scale: Tensor | float) -> dict[str, Tensor]:
        """Computes `loss` and further values to log.

        Args:
            lm: The prompted language model.
            batch: The rows.
            progress: Training progress in [0, 1].
            scale: Weight of the objective on this process, so that the mean over processes is the global mean.
        """
        outcome = self.objective(lm, batch)
        prompt = lm.prompt(batch)
        self.check_weights(prompt.penalties)
        method_terms = [weight * prompt.penalties[name] for name, weight in self.weights.items()]
        added = {penalty.name: penalty(lm, batch, progress) for penalty in self.penalties}
        loss = outcome.loss * scale + sum(method_terms) + sum(added.values())
        terms = {f"penalty/{name}": value for name, value in {**prompt.penalties, **added}.items()}
        return {"loss": loss, **outcome.logs, **terms, **prompt.logs}

    def check_weights(self, reported: Mapping[str, Tensor]) -> None:
        """Checks that the method reports every penalty that has a weight.

        Raises:
            ValueError: Naming the penalties that it does not report.
        """
        if unknown := sorted(set(self.weights) - set(reported)):
            known = f"reports {sorted(reported)}" if reported else "reports none"
            raise ValueError(f"penalty_weights names {unknown}, but {self.method} {known}")
