"""Words that an answer contains, and words that it does not contain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint


@dataclass(frozen=True)
class Keywords(Constraint):
    """The answer contains words and phrases, and does not contain others. Case is ignored; words match as a whole.

    Args:
        contains: Words that occur.
        forbids: Words that do not occur.
    """

    contains: Sequence[str] = ()
    forbids: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, words in (("contains", self.contains), ("forbids", self.forbids)):
            if isinstance(words, str) or not all(isinstance(word, str) and word.strip() for word in words):
                raise ValueError(f"keywords: {name} must be a list of words, got {words!r}")
        if not self.contains and not self.forbids:
            raise ValueError("keywords requires words in contains or in forbids")

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        sentences = []
        if self.contains:
            sentences.append(f"Use the {_name_words(self.contains)} in the answer.")
        if self.forbids:
            sentences.append(f"Do not use the {_name_words(self.forbids)}.")
        return " ".join(sentences)

    def is_met(self, answer: str) -> bool:
        """Returns whether all required words and no forbidden words occur."""
        has_required = all(_occurs(word, answer) for word in self.contains)
        return has_required and not any(_occurs(word, answer) for word in self.forbids)


def _occurs(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _name_words(words: Sequence[str]) -> str:
    listed = ", ".join(f"'{word}'" for word in words)
    return f"word {listed}" if len(words) == 1 else f"words {listed}"
