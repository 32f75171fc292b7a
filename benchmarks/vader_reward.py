"""The sentiment of VADER as a reward: a judge of reviews that knows no trained prompt.

It requires `pip install vaderSentiment==3.3.2`. With this folder on PYTHONPATH: `--data.judge vader_reward.Vader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_texts
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward, examples_of


@final
@dataclass(frozen=True)
class Vader(Reward):
    """The compound score, from -1 to 1, of the start of a review and its continuation (Hutto and Gilbert 2014).

    Args:
        column: Column of the start.
    """

    column: str = "prompt"

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B]."""
        starts = [example.fields[self.column] for example in examples_of(batch)]
        texts = [f"{start} {answer}" for start, answer in zip(starts, answer_texts(lm, batch), strict=True)]
        return self.tensor([self._analyzer.polarity_scores(text)["compound"] for text in texts], batch)

    @cached_property
    def _analyzer(self) -> Any:
        from vaderSentiment.vaderSentiment import (  # type: ignore[import-not-found]  # a package of this benchmark only
            SentimentIntensityAnalyzer,
        )

        return SentimentIntensityAnalyzer()
