"""Training rows that are another draw in each epoch: a function of seed, epoch and row alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast, final

import numpy as np

from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.datamodule import Prepared
from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler
from lightning_softprompt.rag.passage_rendering import PassageRenderer
from lightning_softprompt.rag.passage_selection import Candidate, Draw, QaExample


@final
class EpochIndexedSampler(ResumableBatchSampler):
    """The batches of another sampler, their rows numbered through all epochs: that is how data workers learn of them.

    Args:
        inner: The other.
    """

    def __init__(self, inner: BucketBatchSampler) -> None:
        super().__init__(inner.seed)
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def _batches(self, start: int) -> Iterator[list[int]]:
        self.inner.set_epoch(self.drawn_epoch)
        first = self.drawn_epoch * len(self.inner.lengths)
        for rows in self.inner._batches(start):
            yield [first + row for row in rows]

    @property
    def _identity(self) -> dict[str, Any]:
        return self.inner._identity


@final
@dataclass(frozen=True)
class ResampledDataset:
    """Rows by number and epoch, `epoch * rows + row`; picklable, for data workers.

    Args:
        rows: As they are without what is drawn.
        writer: Writes a row with its passages.
        abstain: What is said to rows without the passages that hold the answer; None has them answered all the same.
        any_answer: Whether the target is any of the right answers, or stays the first.
        seed: Of the draws.
    """

    rows: Prepared
    writer: PassageRenderer
    abstain: str | None
    any_answer: bool
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, Encoded, Example]:
        epoch, row = divmod(number, len(self))
        draw = np.random.default_rng((self.seed, epoch, row))
        written = self.writer.write(*self._drawn(cast(QaExample, self.rows.examples[row]), draw))
        return row, written.encoded, written.example

    def _drawn(self, asked: QaExample, draw: Draw) -> tuple[QaExample, list[Candidate]]:
        showing = self.writer.showing
        hidden = bool(asked.gold) and draw.random() < showing.noise.no_gold
        candidates = showing.drawn(asked, draw, hidden)
        if hidden and self.abstain is not None:
            asked = replace(asked, target=self.abstain, references=(self.abstain,))
        elif self.any_answer and asked.references:
            asked = replace(asked, target=asked.references[int(draw.integers(len(asked.references)))])
        return asked, candidates
