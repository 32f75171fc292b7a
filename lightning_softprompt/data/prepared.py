"""Tokenized rows of a split, and how they are collated into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Encoded, Example
from lightning_softprompt.data.readers.sources import Origin

Split = Literal["train", "validation", "test", "predict"]


@dataclass(frozen=True)
class PreparedRows:
    """A tokenized split. Its items are the input of `Collate`.

    Args:
        examples: The rows as text.
        encoded: The rows as tokens.
        origins: Where each row comes from.
    """

    examples: Sequence[Example]
    encoded: Sequence[Encoded]
    origins: Sequence[Origin]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[int, Encoded, Example]:
        return index, self.encoded[index], self.examples[index]

    @property
    def sample(self) -> PreparedRows:
        """The rows that describe the split: all rows, if they are in memory."""
        return self

    @property
    def where(self) -> list[str]:
        """File and line of each row."""
        return [origin.where for origin in self.origins]

    @property
    def lengths(self) -> Sequence[int]:
        """Number of input and target tokens of each row."""
        return [len(row.ids) + len(row.targets) for row in self.encoded]


@dataclass(frozen=True)
class Collate:
    """Collates items of `PreparedRows` into a batch. Picklable, so that data workers can use it."""

    codec: Codec

    def __call__(self, items: Sequence[tuple[int, Encoded, Example]]) -> Batch:
        """Returns the batch."""
        row_ids, rows, examples = zip(*items, strict=True)
        labels = [example.label for example in examples]
        has_labels = any(label is not None for label in labels)
        return self.codec.collate(rows, labels=labels if has_labels else None, row_ids=row_ids, examples=examples)
