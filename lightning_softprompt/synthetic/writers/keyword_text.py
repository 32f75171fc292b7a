"""Texts that contain given keywords, and summaries of them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.core.word_boundaries import split_words
from lightning_softprompt.synthetic.writers.base import Columns, Request, Row, Source, Step, Writer

SHORTEST_KEYWORD = 4  # letters of a keyword that is taken from a text


@dataclass(frozen=True)
class KeywordText(Writer):
    """Writes a text that contains keywords of a source row, and optionally a summary of the text.

    The columns of a row are `keywords`, `text` and, if requested, `summary`. `scores.keywords` is the share of keywords
    that the text contains; `Score` filters by it.

    Args:
        keywords: Column of the keywords, a list or a text of comma-separated words. Without it, random words of `text`.
        text: Column of the text from which keywords are taken if there is no column of keywords.
        count: Number of keywords that are taken from a text.
        instruction: The instruction; `{keywords}` inserts the keywords.
        summary: Whether to summarize the text in a second step.
        summary_instruction: The instruction of the summary; `{text}` inserts the text.
    """

    keywords: str | None = None
    text: str = "text"
    count: int = 3
    instruction: str = "Write one sentence that contains these words: {keywords}"
    summary: bool = False
    summary_instruction: str = "Summarize this text in a few words.\n\n{text}"
    requires_source = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    @property
    def steps(self) -> Sequence[Step]:
        """The text and its summary."""
        summary = [Step("summary", self.summary_instruction)] if self.summary else []
        return [Step("text", self.instruction), *summary]

    def request(self, number: int, generator: random.Random, source: Source, earlier: Sequence[Row]) -> Request:
        """Returns the keywords of a row; source rows are used in turn."""
        index = number % len(source)
        words = self._take_words(source, index, generator)
        return Request({"keywords": ", ".join(words)}, source.origins[index], {"keywords": words})

    def _take_words(self, source: Source, index: int, generator: random.Random) -> list[str]:
        if self.keywords is not None:
            value = source.rows[index].get(self.keywords)
            listed = value.split(",") if isinstance(value, str) else value
            words = [str(word).strip() for word in listed or () if str(word).strip()]
            if not words:
                raise ValueError(f"{source.origins[index]} has no keywords in the column {self.keywords!r}")
            return words
        words = split_words(source.text(index, self.text).lower())
        candidates = sorted({word for word in words if len(word) >= SHORTEST_KEYWORD and word.isalpha()})
        if not candidates:
            raise ValueError(f"{source.origins[index]} has no word of {SHORTEST_KEYWORD} letters to use as a keyword")
        return generator.sample(candidates, min(self.count, len(candidates)))

    def finish(self, columns: Columns, request: Request, earlier: Sequence[Row]) -> dict[str, Any]:
        """Returns the row with the share of keywords that its text contains."""
        row = super().finish(columns, request, earlier)
        words = row["keywords"]
        num_found = sum(_contains(columns["text"], word) for word in words)
        return {**row, "scores": {"keywords": num_found / len(words)}}


def _contains(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}", text, re.IGNORECASE) is not None
