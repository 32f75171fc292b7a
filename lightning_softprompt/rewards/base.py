"""The contract of rewards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch, Example


class Reward(ABC):
    """Scores answers: the higher, the better.

    A subclass is a frozen dataclass in a file of its own.
    """

    @abstractmethod
    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B] of the answers of a batch, in float32, without gradient.

        Args:
            lm: The language model that is trained. Rewards of trained prompts use its backbone.
            batch: The questions with their answers. `targets` are the tokens of the answers, with the token that ends a
                finished answer.
        """

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts that `explain` returns."""
        return ()

    def explain(self, lm: PromptedLM, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Computes the rewards [B], and the parts that they consist of by name, each [B], to log.

        Args:
            lm: See `__call__`.
            batch: See `__call__`.
        """
        return self(lm, batch), {}

    @staticmethod
    def tensor(values: Sequence[float], batch: Batch) -> Tensor:
        """Returns values [B] as a tensor on the device of a batch."""
        return torch.tensor(values, dtype=torch.float32, device=batch.targets.device)


def examples_of(batch: Batch) -> Sequence[Example]:
    """Returns the questions of a batch as text.

    Raises:
        ValueError: If the batch does not contain them.
    """
    if batch.examples is None:
        raise ValueError("the reward requires the rows as text, which batches of data modules contain")
    return batch.examples
