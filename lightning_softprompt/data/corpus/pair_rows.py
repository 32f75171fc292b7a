"""Pairs of texts of a document, for next-sentence and sentence-order prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast, final

from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.readers.rows import Origin
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedRows, Item, Rng
from lightning_softprompt.data.splits.row_encoder import RowEncoder

FIRST, SECOND = "first", "second"  # columns of the template


@final
@dataclass(frozen=True)
class PairEncoder(RowEncoder):
    """Converts pairs to tokens, and marks the second text. Tokens are not cached, since other pairs are drawn."""

    def encode(self, example: Example) -> Encoded:
        """Encodes a row. The second text follows the first separator."""
        row = super().encode(example)
        separator = self.codec.tokenizer.sep_token_id
        if separator not in row.ids:
            return row
        return row._replace(second_start=row.ids.index(separator) + 1)

    def encode_split(
        self, name: str, examples: Sequence[Example], origins: Sequence[Origin], use_cache: bool
    ) -> list[Encoded]:
        """See `RowEncoder.encode_split`."""
        return super().encode_split(name, examples, origins, use_cache=False)


@dataclass(frozen=True)
class DocumentExample(Example):
    """A pair of texts of a document.

    Args:
        sentences: All sentences of the document, from which other pairs are drawn.
    """

    sentences: tuple[str, ...] = ()


def cut_pair(sentences: Sequence[str], boundary: int, window: int) -> tuple[str, str]:
    """Returns the text before and after a boundary between sentences, each at most `window` bytes.

    A text has whole sentences, at least one.

    >>> cut_pair(["One.", "Two.", "Three.", "Four."], 2, 10)
    ('One. Two.', 'Three.')
    """
    before = _take(sentences[:boundary][::-1], window)
    after = _take(sentences[boundary:], window)
    return " ".join(before[::-1]), " ".join(after)


def _take(sentences: Sequence[str], window: int) -> list[str]:
    taken = [sentences[0]]
    size = len(sentences[0].encode())
    for sentence in sentences[1:]:
        size += 1 + len(sentence.encode())
        if size > window:
            break
        taken.append(sentence)
    return taken


def draw_pair(sentences: Sequence[str], window: int, rng: Rng) -> tuple[str, str]:
    """Returns the texts before and after a random boundary between sentences of a document."""
    return cut_pair(sentences, int(rng.integers(1, len(sentences))), window)


class PairTask(ABC):
    """What distinguishes a pair of consecutive texts from another pair."""

    names: tuple[str, str]  # the classes: consecutive texts, and other pairs
    min_documents = 1  # of a split

    @abstractmethod
    def change(
        self, pair: tuple[str, str], row: int, documents: Sequence[DocumentExample], window: int, rng: Rng
    ) -> tuple[str, str]:
        """Returns a pair that is not consecutive.

        Args:
            pair: Consecutive texts of a document.
            row: Index of the document.
            documents: All documents.
            window: Maximum bytes of a text.
            rng: Random numbers.
        """


@final
@dataclass(frozen=True)
class NextSentence(PairTask):
    """The second text is of another document (BERT, Devlin et al. 2019, arXiv 1810.04805)."""

    names = ("next", "random")
    min_documents = 2

    def change(
        self, pair: tuple[str, str], row: int, documents: Sequence[DocumentExample], window: int, rng: Rng
    ) -> tuple[str, str]:
        """See `PairTask.change`."""
        other = (row + int(rng.integers(1, len(documents)))) % len(documents)
        _, second = draw_pair(documents[other].sentences, window, rng)
        return pair[0], second


@final
@dataclass(frozen=True)
class SentenceOrder(PairTask):
    """The texts are in reverse order (ALBERT, Lan et al. 2020, arXiv 1909.11942)."""

    names = ("in order", "swapped")

    def change(
        self, pair: tuple[str, str], row: int, documents: Sequence[DocumentExample], window: int, rng: Rng
    ) -> tuple[str, str]:
        """See `PairTask.change`."""
        return pair[1], pair[0]


@final
@dataclass(frozen=True)
class PairRows(EpochIndexedRows):
    """Documents with another pair of their texts in each epoch; half of the pairs are consecutive.

    Args:
        rows: The documents.
        seed: Seed of the pairs.
        encoder: Converts a pair to tokens.
        task: Changes a pair.
        words: The target of each class.
        window: Maximum bytes of a text.
    """

    encoder: RowEncoder
    task: PairTask
    words: tuple[str, str]
    window: int

    def draw(self, row: int, rng: Rng) -> Item:
        """Returns a document with a random pair."""
        documents = cast(Sequence[DocumentExample], self.rows.examples)
        document = documents[row]
        pair = draw_pair(document.sentences, self.window, rng)
        label = int(rng.integers(2))
        if label:
            pair = self.task.change(pair, row, documents, self.window, rng)
        fields = {**document.fields, FIRST: pair[0], SECOND: pair[1]}
        example = replace(document, fields=fields, target=self.words[label], label=label)
        return row, self.encoder.encode(example), example

    def draw_all(self) -> PreparedRows:
        """Returns the rows of the first epoch, for an evaluation."""
        items = [self[row] for row in range(len(self))]
        encoded = [row for _, row, _ in items]
        return PreparedRows([example for _, _, example in items], encoded, self.rows.origins)
