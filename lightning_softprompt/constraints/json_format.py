"""Valid JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.constraints.base import Constraint

FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class JsonFormat(Constraint):
    """The whole answer, without a Markdown code fence, is a JSON object or list.

    Args:
        keys: Keys that the object must have.
    """

    keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.keys, str) or not all(isinstance(key, str) for key in self.keys):
            raise ValueError(f"json_format: keys must be a list of texts, got {self.keys!r}")

    @property
    def instruction(self) -> str:
        """The sentence that asks for it."""
        keys = f" with the keys {', '.join(self.keys)}" if self.keys else ""
        return f"Write the entire answer as one valid JSON object{keys}."

    def is_met(self, answer: str) -> bool:
        """Returns whether the answer parses as JSON and has the keys."""
        text = answer.strip()
        fenced = FENCE.match(text)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return False
        if self.keys:
            return isinstance(value, dict) and set(self.keys) <= value.keys()
        return isinstance(value, dict | list)
