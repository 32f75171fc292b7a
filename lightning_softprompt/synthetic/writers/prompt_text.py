"""Texts of a trained prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lightning_softprompt.synthetic.writers.base import Request, Row, Source, Step, Writer


@dataclass(frozen=True)
class PromptText(Writer):
    """Writes with a trained prompt, whose file is `--prompt`: a prompt that was trained on few real rows writes more.

    The prompt file contains the template of its rows, for example with the column `label`. The columns of a row are
    those of its values and `text`.

    Args:
        values: Values of the columns of the prompt's template. Their combinations are used in turn.
    """

    values: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        wrong = [name for name, values in self.values.items() if isinstance(values, str) or not values]
        if wrong or not self.values:
            example = "{label: [good, bad]}"
            raise ValueError(f"values must map columns to lists of texts, such as {example}, got {self.values}")

    @property
    def steps(self) -> Sequence[Step]:
        """The text, without an instruction."""
        return [Step("text", None)]

    def request(self, number: int, generator: random.Random, source: Source, earlier: Sequence[Row]) -> Request:
        """Returns the combination of values of a row."""
        combinations = list(product(*self.values.values()))
        combination = combinations[number % len(combinations)]
        columns = dict(zip(self.values, combination, strict=True))
        return Request(columns, values=columns)
