"""A reward for answers that contain a pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_texts
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward


@final
@dataclass(frozen=True)
class Pattern(Reward):
    r"""1 for an answer that contains a match of a regular expression, else 0.

    Args:
        pattern: The regular expression, such as `^\d+$` for a number.

    Raises:
        ValueError: If it is not a valid regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B]."""
        texts = answer_texts(lm, batch)
        return self.tensor([float(re.search(self.pattern, text) is not None) for text in texts], batch)
