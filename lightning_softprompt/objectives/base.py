"""The contract of objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.rollout_work import RolloutWork


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
        requires_values: Whether the readout must compute a value for each token, as `ValueHead` does.
    """

    has_data_loss: ClassVar[bool] = True
    requires_values: ClassVar[bool] = False

    @property
    def steps_per_batch(self) -> int:
        """Number of training steps that learn from each batch."""
        return 1

    @property
    def max_policy_change(self) -> float | None:
        """The value of `policy_change` in the logs above which the remaining steps of a batch are skipped."""
        return None

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

    def rollout_work(self, questions: int, tokens: int) -> RolloutWork | None:
        """Returns the work of sampling answers and of learning from them; None if the objective samples none.

        Args:
            questions: Number of questions of a batch.
            tokens: Tokens of a question, with the prompt.
        """
        return None

    def begin(self, lm: PromptedLM, batch: Batch) -> Batch:
        """Returns what the steps of a batch learn from: the batch, or answers that are sampled for it."""
        return batch

    def select(self, rows: Batch, number: int, turn: int) -> Batch:
        """Returns the rows of one step.

        Args:
            rows: The rows that `begin` returned.
            number: Number of batches before this one.
            turn: Number of the step among those of the batch, from 0.
        """
        return rows

    def state(self) -> dict[str, float]:
        """Returns values that change during training, for checkpoints; they are the same in all processes."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:  # noqa: B027
        """Sets the values of `state`."""

    def describe_rows(self, lm: PromptedLM, rows: Batch) -> Sequence[Mapping[str, Any]]:
        """Returns the sampled answers that a step has learned from, as rows of a table; none if it samples none.

        Args:
            lm: The language model.
            rows: What `select` returned for the step.
        """
        return ()

    @abstractmethod
    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over the batch."""

    def count(self, batch: Batch) -> Tensor:
        """Counts the terms that the loss averages over, so that losses of several processes can be combined."""
        return batch.mask.any(1).sum()
