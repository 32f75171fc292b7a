"""Windows whose text is corrupted when they are used, as a function of seed, epoch and row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.corpus.corruption import Corruption, CorruptionIds, corrupt
from lightning_softprompt.data.prepared import PreparedRows


@final
@dataclass(frozen=True)
class CorruptedRows:
    """Rows indexed by `epoch * len(rows) + row`. Picklable, so that data workers can use it.

    Args:
        rows: The rows with their whole text as target.
        codec: The codec of the backbone.
        corruption: Selects the tokens to predict.
        glue: Spaces before the text.
        seed: Seed of the selection.
    """

    rows: PreparedRows
    codec: Codec
    corruption: Corruption
    glue: str
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, Encoded, Example]:
        epoch, row = divmod(number, len(self))
        rng = np.random.default_rng((self.seed, epoch, row))
        _, encoded, example = self.rows[row]
        text = self.glue + example.target
        return row, corrupt(encoded, text, self.corruption, self.codec, self._ids, rng), example

    @cached_property
    def _ids(self) -> CorruptionIds:
        return CorruptionIds.of(self.codec)
