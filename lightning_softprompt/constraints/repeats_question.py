"""The question before the answer."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint


@dataclass(frozen=True)
class RepeatsQuestion(Constraint):
    """The answer begins with the question, word for word, and continues after it. Case and white space are ignored.

    Args:
        question: The question.
    """

    question: str

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"repeats_question requires a question, got {self.question!r}")

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        return "First repeat the question word for word without change, then answer it."

    def is_met(self, answer: str) -> bool:
        """Returns whether the answer begins with the question and has more text."""
        question, text = _normalize(self.question), _normalize(answer)
        return text.startswith(question) and len(text) > len(question)


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())
