"""The form of answers to questions: generated or selected from choices, with or without citations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_softprompt.data.labels import GivenLabels, words_by_name


@dataclass(frozen=True)
class AnswerForm:
    """The form of answers: generated, or selected from choices; with or without citations.

    Args:
        choices: The possible answers in order, each with its label word, or a list of names that are their own label
            words. Choices are scored, not generated (default: generate answers).
        abstain: The answer to unanswerable questions.
        training_target: Whether to train on the first correct answer, or on a random one in each epoch.
        cite: Whether answers cite passages by number, as in `Paris [2]`. Training targets cite the gold documents.
            Citations are scored by `cite_precision` and `cite_recall`, and removed before answers are scored.
        long: Whether answers are full sentences, which are also scored by ROUGE-L.

    Raises:
        ValueError: If values contradict each other.
    """

    choices: GivenLabels | None = None
    abstain: str | None = None
    training_target: Literal["first", "any"] = "first"
    cite: bool = False
    long: bool = False

    def __post_init__(self) -> None:
        if self.choices is None:
            return
        if self.abstain is not None:
            raise ValueError("abstain requires generated answers; add it to choices instead")
        if self.cite:
            raise ValueError("cite requires generated answers; remove choices")
        words = words_by_name(self.choices, "choices")
        if len(words) < 2 or any(len(choice_words) != 1 for choice_words in words.values()):
            raise ValueError(f"at least two choices are required, each with one word, got {self.choices}")

    @property
    def choice_words(self) -> dict[str, str] | None:
        """The label word of each choice; None if answers are generated."""
        if self.choices is None:
            return None
        return {name: words[0] for name, words in words_by_name(self.choices, "choices").items()}

    @property
    def uses_any_answer(self) -> bool:
        """Whether the training target is a random correct answer in each epoch."""
        return self.training_target == "any" and self.choices is None


DEFAULT_FORM = AnswerForm()
