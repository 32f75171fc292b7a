"""Texts of given classes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_softprompt.synthetic.writers.base import Request, Row, Source, Step, Writer


@dataclass(frozen=True)
class LabelText(Writer):
    """Writes a text of each class in turn (ZeroGen: Ye et al. 2022, arXiv 2202.07922; SuperGen: Meng et al. 2022).

    The columns of a row are `text` and `label`.

    Args:
        labels: What the instruction inserts as `{label}`, by the name of the class.
        instruction: The instruction. `{label}` inserts the description of the class, `{topic}` a topic.
        topics: Topics, of which each row gets a random one.
        opening: The beginning of the answer, which is not part of the text, such as a quotation mark.
    """

    labels: Mapping[str, str]
    instruction: str = "Write one short {label} text."
    topics: Sequence[str] = field(default=())
    opening: str = ""

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise ValueError(f"labels requires at least two classes, got {dict(self.labels)}")
        if ("{topic}" in self.instruction) != bool(self.topics):
            raise ValueError("the instruction must contain {topic} if topics are given, and only then")

    @property
    def steps(self) -> Sequence[Step]:
        """The text."""
        return [Step("text", self.instruction, self.opening)]

    def request(self, number: int, generator: random.Random, source: Source, earlier: Sequence[Row]) -> Request:
        """Returns the class and the topic of a row. Classes alternate."""
        names = list(self.labels)
        name = names[number % len(names)]
        columns = {"label": self.labels[name]}
        values = {"label": name}
        if self.topics:
            columns["topic"] = values["topic"] = generator.choice(list(self.topics))
        return Request(columns, values=values)
