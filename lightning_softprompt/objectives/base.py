"""The contract of objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch


@dataclass(frozen=True)
class Outcome:
    """A loss, and further values to log.

    Args:
        loss: The loss, a scalar.
        logs: Further scalars by name.
    """

    loss: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A loss of a prompted language model on a batch.

    Attributes:
        has_data_loss: Whether validation and test can compute the loss on their rows.
    """

    has_data_loss: ClassVar[bool] = True

    @property
    def compares_with_start(self) -> bool:
        """Whether the loss compares the method with its values at the start of the run, which are then stored."""
        return False

    def check_method(self, method: str, changes_backbone: bool, noise: Sequence[str]) -> None:  # noqa: B027
        """Checks, before training, that a method can be trained with this objective.

        Args:
            method: The name of the method.
            changes_backbone: Whether it changes the backbone's weights.
            noise: The options that add noise to the prompt in training and are set.

        Raises:
            ValueError: If it cannot, with the reason.
        """

    def with_reward(self, lm: PromptedLM) -> PromptedLM:
        """Returns the language model with the reward by which evaluations compare answers, if the objective has one."""
        return lm

    @abstractmethod
    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over the batch."""

    def count(self, batch: Batch) -> Tensor:
        """Counts the terms that the loss averages over, so that losses of several processes can be combined."""
        return batch.mask.any(1).sum()
