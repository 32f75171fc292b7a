"""Mixing of two rows into one with two numbered questions and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from lightning_softprompt.data.augmentation.base import Augmentation, Draft, RowText
from lightning_softprompt.data.sampling.epoch_indexed import Rng


@final
@dataclass(frozen=True)
class Mixing(Augmentation):
    """Joins a row with another random training row: columns and targets are numbered 1 and 2.

    Two rows that do not fit into max_tokens together remain single.

    Args:
        share: Share of the rows that are mixed.

    Raises:
        ValueError: If the share is not above 0 and at most 1.
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    def check(self, text: RowText) -> None:
        """Refuses rows whose targets are label words."""
        if not text.has_free_targets:
            raise ValueError("Mixing joins two targets, which requires free text; remove it for tasks with classes")

    def apply(self, draft: Draft, rng: Rng, draw_other: Callable[[], Draft], fits: Callable[[Draft], bool]) -> Draft:
        """Returns the row, or a mixture with another row."""
        if rng.random() >= self.share:
            return draft
        other = draw_other()
        columns = {name: number_texts(text, other.columns[name]) for name, text in draft.columns.items()}
        mixed = replace(draft, columns=columns, target=number_texts(draft.target, other.target))
        return mixed if fits(mixed) else draft


def number_texts(first: str, second: str) -> str:
    r"""Returns two texts with numbers.

    >>> number_texts("Add 1.", "Spell it."), number_texts("", "a list"), number_texts("", "")
    ('1. Add 1.\n2. Spell it.', '2. a list', '')
    """
    numbered = [f"{number}. {text}" for number, text in ((1, first), (2, second)) if text]
    return "\n".join(numbered)
