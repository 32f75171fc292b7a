"""Similar texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row, text_of, words_of


@dataclass(frozen=True)
class NearDuplicates(Filter):
    """Drops texts that are similar to an earlier row that was not dropped.

    The similarity is the Jaccard index of character n-grams: shared n-grams over all n-grams of the two texts.

    Args:
        similarity: Smallest similarity of texts that are dropped.
        ngram: Length of n-grams, in characters.
        column: Column of the text.
    """

    similarity: float = 0.7
    ngram: int = 5
    column: str = "text"

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1 or self.ngram < 1:
            raise ValueError(
                f"NearDuplicates requires 0 < similarity <= 1 and ngram >= 1, got {self.similarity} and {self.ngram}"
            )

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the most similar earlier row for each dropped row."""
        holders: defaultdict[str, list[int]] = defaultdict(list)  # rows that contain an n-gram
        sizes: dict[int, int] = {}
        reasons: Reasons = []
        for index, row in enumerate(rows):
            grams = self._ngrams(text_of(row, self.column))
            shared = Counter(holder for gram in grams for holder in holders[gram])
            similarities = {other: count / (sizes[other] + len(grams) - count) for other, count in shared.items()}
            nearest = max(similarities, key=lambda other: similarities[other], default=index)
            if nearest != index and similarities[nearest] >= self.similarity:
                name = rows[nearest].get("row", nearest)
                reasons.append(f"similarity {similarities[nearest]:.2f} to row {name}")
                continue
            reasons.append(None)
            sizes[index] = len(grams)
            for gram in grams:
                holders[gram].append(index)
        return reasons

    def _ngrams(self, text: str) -> set[str]:
        plain = " ".join(words_of(text))
        count = max(1, len(plain) - self.ngram + 1)
        return {plain[start : start + self.ngram] for start in range(count)}
