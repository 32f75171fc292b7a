"""Noise on the words of one column."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

from lightning_softprompt.data.augmentation.base import Augmentation, Draft, RowText, check_column
from lightning_softprompt.data.sampling.epoch_indexed import Rng

WORD = re.compile(r"\S+")


@final
@dataclass(frozen=True)
class Noise(Augmentation):
    """Drops, swaps and misspells words of one column, or changes their case.

    Args:
        column: The column, such as `instruction`. Other columns and the target are not changed.
        dropout: Probability of each word to be removed; one word always remains.
        swap: Probability of each word to change places with the next one.
        typo: Probability of each word of at least three letters to lose, double or swap a letter.
        casing: Probability of the text to be in lower case or upper case, each with half of it.

    Raises:
        ValueError: If a value is not a probability, or all are 0.
    """

    column: str
    dropout: float = 0.0
    swap: float = 0.0
    typo: float = 0.0
    casing: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.dropout, self.swap, self.typo, self.casing)
        if not all(0 <= rate <= 1 for rate in rates) or not any(rates):
            raise ValueError(f"dropout, swap, typo and casing must be probabilities, not all 0, got {rates}")

    def check(self, text: RowText) -> None:
        """Refuses a column that rows do not have."""
        check_column(self.column, text, "Noise")

    def apply(self, draft: Draft, rng: Rng, draw_other: Callable[[], Draft], fits: Callable[[Draft], bool]) -> Draft:
        """Returns the row with noise on the column."""
        noisy = self.change(draft.columns[self.column], rng)
        return replace(draft, columns={**draft.columns, self.column: noisy})

    def change(self, text: str, rng: Rng) -> str:
        """Returns a text with noise. White space between the remaining words is kept."""
        spans = [match.span() for match in WORD.finditer(text)]
        if not spans:
            return text
        words = [text[start:end] for start, end in spans]
        gaps = [text[end:start] for (_, end), (start, _) in pairwise(spans)]
        for index in range(len(words) - 1):
            if rng.random() < self.swap:
                words[index], words[index + 1] = words[index + 1], words[index]
        words = [misspell(word, rng) if rng.random() < self.typo else word for word in words]
        remaining = [index for index in range(len(words)) if rng.random() >= self.dropout]
        remaining = remaining or [int(rng.integers(len(words)))]
        noisy = words[remaining[0]]
        for index in remaining[1:]:
            noisy += gaps[index - 1] + words[index]
        case = rng.random()
        if case < self.casing:
            noisy = noisy.lower() if case < self.casing / 2 else noisy.upper()
        return noisy


def misspell(word: str, rng: Rng) -> str:
    """Returns a word with a letter removed, doubled or swapped with the next one; short words are not changed."""
    if len(word) < 3:
        return word
    index = int(rng.integers(1, len(word) - 1))
    before, letter, after = word[:index], word[index], word[index + 1 :]
    kind = int(rng.integers(3))
    if kind == 0:
        return before + after
    if kind == 1:
        return before + letter + letter + after
    return before + after[0] + letter + after[1:]
