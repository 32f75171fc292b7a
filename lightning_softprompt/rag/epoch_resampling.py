"""Training rows that are resampled in each epoch, as a function of seed, epoch and row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast, final

from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedRows, Item, Rng
from lightning_softprompt.rag.passage_rendering import PassageRenderer
from lightning_softprompt.rag.passage_selection import Candidate, QaExample


@final
@dataclass(frozen=True)
class ResampledDataset(EpochIndexedRows):
    """Questions with other passages in each epoch.

    Args:
        rows: The rows without noise.
        seed: Seed of the noise.
        renderer: Renders a row with its passages.
        abstain: Target of rows whose gold passages are hidden; None keeps their answer.
        any_answer: Whether the target is a random reference answer instead of the first one.
    """

    renderer: PassageRenderer
    abstain: str | None
    any_answer: bool

    def draw(self, row: int, rng: Rng) -> Item:
        """Returns a row with sampled passages."""
        example, candidates = self._sample(cast(QaExample, self.rows.examples[row]), rng)
        rendered = self.renderer.render(example, candidates)
        return row, rendered.encoded, rendered.example

    def _sample(self, example: QaExample, rng: Rng) -> tuple[QaExample, list[Candidate]]:
        """Samples passages and the target of a row."""
        selector = self.renderer.selector
        hide_gold = bool(example.gold) and rng.random() < selector.noise.no_gold
        candidates = selector.sample(example, rng, hide_gold)
        if hide_gold and self.abstain is not None:
            example = replace(example, target=self.abstain, references=(self.abstain,))
        elif self.any_answer and example.references:
            number = int(rng.integers(len(example.references)))
            example = replace(example, target=example.references[number])
        return example, candidates
