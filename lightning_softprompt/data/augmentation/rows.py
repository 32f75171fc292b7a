"""Training rows whose text is changed when they are used, as a function of seed, epoch and row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_softprompt.data.augmentation.base import Augmentation, Draft, RowText
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedRows, Item, Rng


@final
@dataclass(frozen=True)
class AugmentedRows(EpochIndexedRows):
    """Rows with another random change of their text in each epoch.

    Args:
        rows: The rows.
        seed: Seed of the changes.
        text: Reads and writes the text of a row.
        augmentations: The changes, in this order.
    """

    text: RowText
    augmentations: tuple[Augmentation, ...]

    def draw(self, row: int, rng: Rng) -> Item:
        """Returns a row with a changed text."""
        example = self.rows.examples[row]

        def draw_other() -> Draft:
            number = int(rng.integers(len(self) - 1)) if len(self) > 1 else 0
            return self.text.read(self.rows.examples[number + (number >= row and len(self) > 1)])

        def fits(draft: Draft) -> bool:
            try:
                encoded, _ = self.text.write(example, draft)
            except ValueError:
                return False
            return encoded.num_truncated == 0

        draft = self.text.read(example)
        for augmentation in self.augmentations:
            draft = augmentation.apply(draft, rng, draw_other, fits)
        encoded, changed = self.text.write(example, draft)
        return row, encoded, changed
