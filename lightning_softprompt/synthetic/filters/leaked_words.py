"""Label words and words of the instruction in a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row, text_of


@dataclass(frozen=True)
class LeakedWords(Filter):
    """Drops texts that contain words of the label or of the instruction, such as "a positive review".

    Args:
        words: The words and phrases. They match as a whole, and case is ignored.
        column: Column of the text.
    """

    words: Sequence[str]
    column: str = "text"

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not self.words or not all(word.strip() for word in self.words):
            raise ValueError(f"LeakedWords requires a list of words, got {self.words!r}")

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the word that each dropped text contains."""
        pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in self.words), re.IGNORECASE)
        matches = [pattern.search(text_of(row, self.column)) for row in rows]
        return [None if match is None else f"contains {match[0]!r}" for match in matches]
