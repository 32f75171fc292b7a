"""New instructions from examples of instructions."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.core.word_boundaries import split_words
from lightning_softprompt.synthetic.writers.base import Columns, Request, Row, Source, Step, Writer

NUMBER = re.compile(r"^\s*(?:Task\s*)?\d+[.:)]\s*")


@dataclass(frozen=True)
class SelfInstruct(Writer):
    """Writes an instruction after examples of others, and an answer to it (Wang et al. 2022, arXiv 2212.10560).

    Examples are source rows and earlier written instructions that are not too similar to others. The columns of a row
    are `instruction` and `output`. `scores.similarity` is the highest ROUGE-L with any instruction before it; `Score`
    filters by it.

    Args:
        instruction: Column of the instruction in source rows.
        seeds: Number of source rows that are used.
        human: Examples from source rows.
        machine: Examples from written rows.
        most_similar: Highest similarity of a written instruction that becomes an example.
        request_text: Introduction to the examples.
    """

    instruction: str = "instruction"
    seeds: int = 175
    human: int = 6
    machine: int = 2
    most_similar: float = 0.7
    request_text: str = "Here is a list of different tasks. Continue it with one more task."
    requires_source = True
    main_column = "instruction"

    def __post_init__(self) -> None:
        if self.human < 1 or self.machine < 0 or self.seeds < self.human:
            raise ValueError(
                f"human must be at least 1, machine at least 0 and seeds at least human, got human={self.human}, "
                f"machine={self.machine} and seeds={self.seeds}"
            )

    @property
    def steps(self) -> Sequence[Step]:
        """The instruction and the answer to it."""
        examples = f"{self.request_text}\n\n{{examples}}"
        return [Step("instruction", examples, "{next}."), Step("output", "{instruction}")]

    def request(self, number: int, generator: random.Random, source: Source, earlier: Sequence[Row]) -> Request:
        """Returns random examples in random order."""
        indices = range(min(self.seeds, len(source)))
        chosen = generator.sample(indices, min(self.human, len(indices)))
        texts = [" ".join(source.text(index, self.instruction).split()) for index in chosen]
        usable = [row["instruction"] for row in earlier if self._is_new(row)]
        texts += generator.sample(usable, min(self.machine, len(usable)))
        generator.shuffle(texts)
        lines = [f"{place}. {text}" for place, text in enumerate(texts, 1)]
        origins = ", ".join(source.origins[index] for index in sorted(chosen))
        columns = {"examples": "\n".join(lines), "next": str(len(texts) + 1)}
        seeds = [source.text(index, self.instruction) for index in indices]
        return Request(columns, origins, {"seeds": seeds})

    def _is_new(self, row: Row) -> bool:
        return bool(row["instruction"]) and row["scores"]["similarity"] <= self.most_similar

    def finish(self, columns: Columns, request: Request, earlier: Sequence[Row]) -> dict[str, Any]:
        """Returns the row with its similarity to the instructions before it."""
        lines = columns["instruction"].splitlines() or [""]
        instruction = NUMBER.sub("", lines[0]).strip()
        seeds = (request.values or {})["seeds"]
        others = [*seeds, *(row["instruction"] for row in earlier)]
        similarity = max((rouge_l(instruction, other) for other in others), default=0.0)
        return {"instruction": instruction, "output": columns["output"], "scores": {"similarity": similarity}}


def rouge_l(text: str, other: str) -> float:
    """Returns the F1 of the longest common subsequence of words (Lin 2004), ignoring case.

    >>> rouge_l("Name a red fruit.", "Name one red fruit")
    0.75
    """
    words, other_words = split_words(text.lower()), split_words(other.lower())
    if not words or not other_words:
        return 0.0
    lengths = [0] * (len(other_words) + 1)  # of common subsequences with each start of the other text
    for word in words:
        diagonal = 0
        for place, other_word in enumerate(other_words, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other_word else max(above, lengths[place - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(words) + len(other_words))
