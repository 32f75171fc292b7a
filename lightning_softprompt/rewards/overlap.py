"""A reward for answers that share words with a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_texts
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.metrics.text import rouge
from lightning_softprompt.rewards.base import Reward, examples_of


@final
@dataclass(frozen=True)
class Overlap(Reward):
    """The F1 of ROUGE with the best reference answer of the question.

    Args:
        metric: The kind of ROUGE.
    """

    metric: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B].

        Raises:
            ValueError: If a question has no reference answer.
        """
        values = []
        for text, example in zip(answer_texts(lm, batch), examples_of(batch), strict=True):
            references = example.references or ((example.target,) if example.target else ())
            if not references:
                raise ValueError(f"Overlap requires reference answers, but a row has none: {dict(example.fields)}")
            values.append(rouge(text, references, [self.metric])[self.metric])
        return self.tensor(values, batch)
