"""`RolloutWork`: how many tokens the backbone computes in a rollout, for estimates before a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class RolloutWork:
    """The work of a rollout on one process, if all questions and answers have their maximum length.

    Work is counted in forward passes of a token. Learning counts twice, since the backward pass computes no gradients
    of frozen weights. Rewards of trained prompts are not included.

    Args:
        questions: Number of questions.
        answers: Number of answers to each question.
        new_tokens: Tokens of an answer.
        steps: Number of training steps of the rollout.
        learned_rows: Number of answers of one step.
        passes: Forward passes of a token by what requires them: `sampling`, `learning`, and others.
    """

    questions: int
    answers: int
    new_tokens: int
    steps: int
    learned_rows: int
    passes: dict[str, int]

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that are sampled."""
        return self.questions * self.answers * self.new_tokens
