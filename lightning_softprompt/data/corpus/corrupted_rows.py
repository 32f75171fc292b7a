"""Windows whose text is corrupted when they are used, as a function of seed, epoch and row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.data.corpus.corruption import Corruption, CorruptionIds, corrupt
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedRows, Item, Rng


@final
@dataclass(frozen=True)
class CorruptedRows(EpochIndexedRows):
    """Rows with other corrupted tokens in each epoch.

    Args:
        rows: The rows with their whole text as target.
        seed: Seed of the selection.
        codec: The codec of the backbone.
        corruption: Selects the tokens to predict.
        glue: Spaces before the text.
    """

    codec: Codec
    corruption: Corruption
    glue: str

    def draw(self, row: int, rng: Rng) -> Item:
        """Returns a row with corrupted tokens."""
        _, encoded, example = self.rows[row]
        text = self.glue + example.target
        return row, corrupt(encoded, text, self.corruption, self.codec, self._ids, rng), example

    @cached_property
    def _ids(self) -> CorruptionIds:
        return CorruptionIds.of(self.codec)
