"""The pairs of answers of a batch, of which one is better than the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_softprompt.core.types import Batch, PreferenceExample


@dataclass(frozen=True)
class AnswerPairs:
    """The pairs of answers [N] of a batch, for all questions.

    Args:
        better: Positions of the better answers in the batch.
        worse: Positions of the worse answers.
        questions: The number of the question of each pair, from 0.
        margins: By how much the better answer is better; 0 if it is unknown.
    """

    better: Tensor
    worse: Tensor
    questions: Tensor
    margins: Tensor

    def __len__(self) -> int:
        return len(self.better)

    def differences(self, values: Tensor) -> Tensor:
        """Returns how much larger a value [B] of the better answer is, for each pair [N]."""
        return values[self.better] - values[self.worse]

    def mean(self, values: Tensor) -> Tensor:
        """Averages values [N] over the pairs of each question, and then over questions.

        A question with many answers therefore has no larger weight than a question with two.
        """
        counts = torch.bincount(self.questions)
        weights = 1 / counts[self.questions].to(values.dtype)
        return (values * weights).sum() / (counts > 0).sum()


def pairs_of(batch: Batch) -> AnswerPairs:
    """Returns all pairs of answers to the same question that have different grades.

    Raises:
        ValueError: If the rows have no grades or no questions in common, or no pair has different grades.
    """
    if batch.groups is None or batch.grades is None:
        raise ValueError(
            "preferences require several answers to each question, one of them better than the others; use "
            "PreferenceDataModule"
        )
    batch.units()  # checks that the rows of a question are adjacent
    is_same_question = batch.groups[:, None] == batch.groups[None]
    is_better = batch.grades[:, None] > batch.grades[None]
    better, worse = (is_same_question & is_better).nonzero(as_tuple=True)
    if not len(better):
        raise ValueError("no question of the batch has answers with different grades; a group must not be divided")
    _, questions = torch.unique_consecutive(batch.groups[better], return_inverse=True)
    margins = torch.zeros(len(better), device=better.device) if batch.margins is None else batch.margins[better]
    return AnswerPairs(better, worse, questions, margins)


def preferences_of(batch: Batch) -> list[PreferenceExample]:
    """Returns the text of each question of a batch with its answers, in the order of `batch.units`.

    Raises:
        ValueError: If the rows are not answers that are compared.
    """
    examples = batch.examples or ()
    firsts = [examples[unit[0]] for unit in batch.units()] if examples else []
    questions = [example for example in firsts if isinstance(example, PreferenceExample)]
    if not questions or len(questions) < len(firsts):
        raise ValueError("rows require answers to compare, as PreferenceDataModule reads them")
    return questions
