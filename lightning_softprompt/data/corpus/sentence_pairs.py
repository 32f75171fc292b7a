"""`SentencePairDataModule`: next-sentence and sentence-order prediction on documents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_softprompt.core.sentences import sentences
from lightning_softprompt.core.types import Classes, Example
from lightning_softprompt.data.corpus.checks import MIN_WINDOW, is_undivided
from lightning_softprompt.data.corpus.documents import Boundary, read_documents, read_text
from lightning_softprompt.data.corpus.pair_rows import (
    FIRST,
    SECOND,
    DocumentExample,
    NextSentence,
    PairEncoder,
    PairRows,
    PairTask,
    cut_pair,
)
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import PreparedRows, Split
from lightning_softprompt.data.readers.sources import DataError, OnBadRow, Origin, Rows
from lightning_softprompt.data.sampling.bucketing import Order, ResumableLoader
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedSampler
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation

log = logging.getLogger(__name__)
SEPARATOR = "separator"  # the column of the template that is the tokenizer's separator
EVALUATION_SEED = 0  # of the pairs in validation and test, which do not depend on `seed`


@final
class SentencePairDataModule(SoftPromptDataModule):
    r"""Classifies whether two texts follow each other in a document: pre-training tasks of encoders.

    Each document is a row: two texts before and after a random boundary between its sentences. In half of the rows, the
    second text is from another document (`NextSentence`), or the texts are swapped (`SentenceOrder`). Training draws
    another pair of each document in each epoch; validation and test always use the same pairs. Documents with less than
    two sentences are ignored. Encoders with two token types, such as BERT, read the second text with type 1.

        softprompt fit --backbone.name ENCODER --model LoRA --model.readout ClassHead --model.readout.pool first \
            --data SentencePairDataModule --data.path FOLDER

    Sources are those of `CorpusDataModule`.

    Args:
        template: Text of a row: the columns `first` and `second` are the texts, `separator` is the separator of the
            tokenizer or a line break if it has none, `{soft}` marks soft tokens, and `{target}` the label word.
        pairs: Which pairs are not consecutive: `NextSentence` (default) or `SentenceOrder`.
        words: Label words of consecutive and of other pairs, for readouts that use them.
        column: Column of the text in sources of rows.
        window: Maximum bytes of each of the two texts in UTF-8, which have whole sentences.
        boundary: What ends a document of a text file, see `CorpusDataModule`.
        common: Arguments of every data module.

    Raises:
        ValueError: If there are not two label words, or the window is too small.
    """

    can_augment = False

    def __init__(
        self,
        template: str = "{soft}{first}{separator}{second}{target}",
        pairs: PairTask | None = None,
        words: tuple[str, str] = ("yes", "no"),
        column: str = "text",
        window: int = 512,
        boundary: Boundary = "auto",
        truncate: list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=template, truncate=[FIRST, SECOND] if truncate is None else truncate, **common)
        if window < MIN_WINDOW:
            raise ValueError(f"window must be at least {MIN_WINDOW} bytes, got {window}")
        if len(set(words)) < 2:
            raise ValueError(f"words must be two different label words, got {words}")
        self.pairs, self.words = pairs or NextSentence(), words
        self.column, self.window, self.boundary = column, window, boundary
        self._row_source.reader = self._read_documents
        self._row_source.is_undivided = is_undivided

    def _read_documents(self, source: Any, split: str, on_bad_row: OnBadRow, columns: Sequence[str]) -> Rows:
        return read_documents(source, split, on_bad_row, columns, self.boundary)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The column of the text."""
        return (self.column,)

    @property
    def resamples(self) -> bool:
        """Always True: training rows change from epoch to epoch."""
        return True

    @property
    def classes(self) -> Classes:
        """Consecutive texts, and other pairs."""
        words = [[self.template.glue + word] for word in self.words]
        return Classes(dict(zip(self.pairs.names, words, strict=True)), self.template.text)

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy, F1 and other classification metrics."""
        return ClassificationEvaluation(self.pairs.names)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Returns a document as a pair of its first texts."""
        parts = tuple(sentences(read_text(row, self.column)))
        first, second = cut_pair(parts, 1, self.window) if len(parts) > 1 else ("", "")
        separator = self.codec.tokenizer.sep_token or "\n"
        fields = {FIRST: first, SEPARATOR: separator, SECOND: second}
        spans = {SEPARATOR: ((0, len(separator)),)}  # the separator is a control token
        return DocumentExample(fields, self.words[0], 0, template_spans=spans, sentences=parts)

    def convert_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Returns the documents with at least two sentences.

        Raises:
            DataError: If no document has two sentences.
        """
        examples, origins = super().convert_rows(name)
        usable = [number for number, example in enumerate(examples) if example.fields[SECOND]]
        if not usable:
            raise DataError(f"{self.rows(name).name}: none of its {len(examples)} documents has two sentences")
        if len(usable) < len(examples):
            count = len(examples) - len(usable)
            log.info("%d of the %d %s documents have less than two sentences", count, len(examples), name)
        return [examples[number] for number in usable], [origins[number] for number in usable]

    def prepare_split(self, name: Split) -> PreparedRows:
        """Prepares the documents of a split, those of an evaluation with the pairs that are scored."""
        documents = super().prepare_split(name)
        if name in ("train", "predict"):
            return documents
        return self._pair_rows(documents, EVALUATION_SEED).draw_all()

    @property
    def _encoder(self) -> PairEncoder:
        return PairEncoder(**vars(super()._encoder))

    def _pair_rows(self, documents: PreparedRows, seed: int) -> PairRows:
        """Returns the rows of documents.

        Raises:
            DataError: If there are too few documents.
        """
        if len(documents) < self.pairs.min_documents:
            raise DataError(
                f"{type(self.pairs).__name__} requires at least {self.pairs.min_documents} documents with two "
                f"sentences in a split, got {len(documents)}; add documents, or use SentenceOrder"
            )
        return PairRows(documents, seed, self._encoder, self.pairs, self.words, self.window)

    def build_loader(self, name: Split, order: Order) -> ResumableLoader:
        """Returns a loader, in training with other pairs in each epoch."""
        if order != "shuffled":
            return super().build_loader(name, order)
        rows = self._pair_rows(self.split(name), self.seed)
        sampler = EpochIndexedSampler(self.sampler(name, order, self.ranks), len(rows))
        return ResumableLoader(rows, sampler, self.collate, num_workers=self.num_workers)
