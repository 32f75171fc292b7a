"""Stored paraphrases in place of the texts of one column."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import final

from lightning_softprompt.data.augmentation.base import Augmentation, Draft, RowText, check_column
from lightning_softprompt.data.sampling.epoch_indexed import Rng


@final
@dataclass(frozen=True)
class Paraphrases(Augmentation):
    """Replaces the text of a column by one of its paraphrases, which `softprompt paraphrase` writes.

    Texts without paraphrases are not changed.

    Args:
        path: The file of `softprompt paraphrase`: lines with `text` and `paraphrases`.
        column: The column.
        share: Probability that a text with paraphrases is replaced.

    Raises:
        ValueError: If the share is not above 0 and at most 1.
    """

    path: str
    column: str = "instruction"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    @cached_property
    def by_text(self) -> Mapping[str, list[str]]:
        """The paraphrases of each text.

        Raises:
            ValueError: If a line of the file is not valid.
        """
        paraphrases: dict[str, list[str]] = {}
        for number, line in enumerate(Path(self.path).expanduser().read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                paraphrases[row["text"]] = [str(text) for text in row["paraphrases"]]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}, line {number}: expected JSON with text and paraphrases") from None
        return paraphrases

    def check(self, text: RowText) -> None:
        """Reads the file, and refuses a column that rows do not have."""
        check_column(self.column, text, "Paraphrases")
        if not any(self.by_text.values()):
            raise ValueError(f"{self.path} has no paraphrases")

    def apply(self, draft: Draft, rng: Rng, draw_other: Callable[[], Draft], fits: Callable[[Draft], bool]) -> Draft:
        """Returns the row with a paraphrase of the column."""
        paraphrases = self.by_text.get(draft.columns[self.column])
        if not paraphrases or rng.random() >= self.share:
            return draft
        chosen = paraphrases[int(rng.integers(len(paraphrases)))]
        return replace(draft, columns={**draft.columns, self.column: chosen})
