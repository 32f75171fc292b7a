"""`CorpusDataModule`: continued pre-training and likelihood evaluation on documents."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast, final

import numpy as np

from lightning_softprompt.core.types import Example, WindowExample
from lightning_softprompt.data.corpus.checks import (
    MIN_WINDOW,
    check_corpora,
    check_parts,
    check_sizes,
    describe_size,
    is_undivided,
)
from lightning_softprompt.data.corpus.cloze import draw_questions, read_questions
from lightning_softprompt.data.corpus.corrupted_rows import CorruptedRows
from lightning_softprompt.data.corpus.corruption import Corruption, select_corruption
from lightning_softprompt.data.corpus.documents import Boundary, read_documents, read_text
from lightning_softprompt.data.corpus.rows import CorpusRows
from lightning_softprompt.data.corpus.stored_documents import StoredDocuments, store_documents
from lightning_softprompt.data.corpus.stored_windows import StoredRows, WindowTable
from lightning_softprompt.data.corpus.strides import CONTEXT, divide_by_stride, encode_context
from lightning_softprompt.data.corpus.windows import Window, cut_windows
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import PreparedRows, Split
from lightning_softprompt.data.readers.sources import DataError, OnBadRow, Origin, Rows
from lightning_softprompt.data.sampling.bucketing import Order, ResumableLoader
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedSampler
from lightning_softprompt.data.sampling.resumable import ResumableBatchSampler
from lightning_softprompt.data.sampling.task_mixing import MixedBatchSampler, quotas
from lightning_softprompt.data.splits.row_encoder import RowEncoder
from lightning_softprompt.data.token_cache import content_key
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.likelihood import LikelihoodEvaluation
from lightning_softprompt.evaluation.words.cloze import ClozeQuestion, ClozeTest, check_family
from lightning_softprompt.evaluation.words.word_counts import count_words, strip_punctuation
from lightning_softprompt.evaluation.words.word_nats import WordNats

log = logging.getLogger(__name__)
EVALUATION_SEED = 0  # of the corruption in validation and test, which does not depend on `seed`
OF_MAIN_CORPUS = (
    "backbone",
    "path",
    "train",
    "validation",
    "test",
    "predict",
    "corpora",
    "rates",
    "cloze",
    "word_frequencies",
)


@final
class CorpusDataModule(SoftPromptDataModule):
    r"""Continues the pre-training of a language model on documents, and measures their likelihood.

    Each document is divided into windows, and each window is a row that is predicted completely. The windows of a batch
    are packed without padding and do not attend to each other. Windows are measured in bytes and cut at white space, so
    that models with different tokenizers predict the same windows.

        softprompt fit --model PromptTuning --data CorpusDataModule --data.path FOLDER
        softprompt test --model NoPrompt --data CorpusDataModule --data.test book.txt

    A source is a text file, a folder of text files (.txt, .md, .html, .pdf), or any source of rows with a column of
    text, such as JSON lines. In a text file, a blank line ends a document; each file of a folder is a document. A
    folder may have text files of splits, such as `train.txt` and `validation.txt`, or a folder for each split.
    Without such splits, documents are held out for validation and test at random by `seed`.

    Args:
        template: Text of a row. `{soft}` marks soft tokens, `{target}` the window. It contains no columns.
        column: Column of the text in sources of rows.
        window: Maximum bytes of a window in UTF-8. A window that has more than max_tokens tokens is divided.
        stride: Bytes of each window that evaluations score (default: the whole window). The rest of the window is the
            text before them, as context without loss, so that each token is predicted from more text and scored once.
        boundary: What ends a document of a text file: a blank line, each line, or the end of the file (default: a blank
            line, and the end of the file in a folder).
        corruption: Which tokens are predicted (default: all tokens for decoders, `MaskTokens` for encoders, and
            `CorruptSpans` for encoder-decoders, which also support `SplitPrefix`). Training selects other tokens in
            each epoch; validation and test always select the same ones.
        stream: Whether to read windows from disk when they are used, for a corpus that does not fit into memory. Its
            text is copied to the cache folder once.
        corpora: Sources of further corpora by name, such as `{general: wikitext.txt}`. Validation and test score them,
            too, and log their metrics as `general/bits_per_byte`.
        rates: Share of the training batches of each further corpus, such as `{general: 0.1}` to replay general text
            (default: none, so that training uses the main corpus only). An epoch is the main corpus once.
        cloze: Number of questions about rare terms that a test asks (default: none), or a file of questions, as
            `softprompt cloze` writes it. A question has a term removed from a window, and nine other terms.
        word_frequencies: Whether a test logs the mean nats of a word by its occurrences in the training documents.
        common: Arguments of every data module.

    Raises:
        ValueError: If the template has columns or does not end with the target, the window is too small, or a rate
            names no corpus.
    """

    can_augment = False

    def __init__(
        self,
        template: str = "{soft}{target}",
        column: str = "text",
        window: int = 1024,
        boundary: Boundary = "auto",
        corruption: Corruption | None = None,
        stream: bool = False,
        corpora: dict[str, str] | None = None,
        rates: dict[str, float] | None = None,
        cloze: int | str | None = None,
        word_frequencies: bool = False,
        stride: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=template, **common)
        if self.template.columns:
            raise ValueError(
                f"the template of CorpusDataModule inserts no columns, got {list(self.template.columns)}; the text of "
                "data.column is the {target}"
            )
        if not template.endswith("{target}"):
            raise ValueError(f"the template of CorpusDataModule must end with {{target}}, got {template!r}")
        check_sizes(window, stride, self.template)
        if stream and self.batch_tokens is not None:
            raise ValueError("with stream, the tokens of windows are unknown; set batch_size instead of batch_tokens")
        if stream and self.rename_columns:
            raise ValueError("stream reads a column by its name in the source; set column instead of rename_columns")
        self.column, self.window, self.boundary, self.stream = column, window, boundary, stream
        self.stride = stride
        self.corruption = corruption
        self.corpora, self.rates = dict(corpora or {}), dict(rates or {})
        check_corpora(self.corpora, self.rates)
        if isinstance(cloze, int) and cloze < 1:
            raise ValueError(f"cloze must be at least 1, or a file of questions, got {cloze}")
        self.cloze, self.word_frequencies = cloze, word_frequencies
        self._row_source.reader = self._read_documents
        self._row_source.is_undivided = is_undivided
        self._modules: dict[str, CorpusDataModule] = {}  # of the further corpora, created when they are used
        self.corpus = ""  # the name of the corpus if this module belongs to another one

    def _read_documents(self, source: Any, split: str, on_bad_row: OnBadRow, columns: Sequence[str]) -> Rows:
        read = store_documents if self.stream and split != "predict" else read_documents
        return read(source, split, on_bad_row, columns, self.boundary)

    @property
    def evaluation(self) -> Evaluation:
        """Loss and perplexity per token; also per word and byte if all tokens are predicted."""
        is_complete = self.used_corruption is None
        if self.stride is not None and not is_complete:
            raise ValueError("stride requires a decoder, which predicts every token; remove data.stride")
        cloze = None
        if self.cloze is not None:
            check_family(self.codec)
            cloze = ClozeTest(self._read_cloze, self.template, self.max_tokens)
        word_nats = WordNats(self._count_training_words, self.template.glue) if self.word_frequencies else None
        return LikelihoodEvaluation(tuple(self.corpora), is_complete, cloze, word_nats)

    def _read_cloze(self) -> tuple[list[ClozeQuestion], int]:
        """Returns the questions of a test, and the number of rows of the main corpus."""
        num_rows = len(cast(CorpusRows, self.split("test")).parts[""])
        if isinstance(self.cloze, int):
            return self.draw_cloze(self.cloze), num_rows
        return read_questions(str(self.cloze)), num_rows

    def draw_cloze(self, count: int) -> list[ClozeQuestion]:
        """Draws questions about rare terms of the test documents. They do not depend on `seed`.

        Args:
            count: Maximum number of questions.

        Raises:
            DataError: If there are no rare terms.
        """
        windows = cast(Sequence[WindowExample], cast(CorpusRows, self.split("test")).parts[""].examples)
        splits: tuple[Split, ...] = ("train", "test")
        texts = (text for corpus in self.corpora for name in splits for text in self._module_of(corpus).texts(name))
        counts = count_words(self.texts("train"), strip_punctuation)
        return draw_questions(windows, counts, count_words(texts), self.codec, count, EVALUATION_SEED)

    def _count_training_words(self) -> Counter[str]:
        return count_words(self.texts("train"))

    def texts(self, name: Split) -> Iterator[str]:
        """Yields the text of each window of a split of the main corpus, which is not converted to tokens."""
        if self.stream:
            examples = self._prepare_stored(name).examples
        else:
            examples = (self.hold_out_rows if self._is_held_out(name) else self.convert_rows)(name)[0]
        return (example.target for example in examples)

    @cached_property
    def used_corruption(self) -> Corruption | None:
        """The corruption, or the default of the backbone's family; None to predict every token.

        Raises:
            ValueError: If the backbone does not support it.
        """
        return select_corruption(self.corruption, self.codec)

    @property
    def resamples(self) -> bool:
        """Whether training rows change from epoch to epoch, as corrupted ones do."""
        return self.used_corruption is not None or super().resamples

    @property
    def _trains_ends(self) -> bool:
        """Whether the last window of a document ends with the token that stops generation."""
        return self.used_corruption is None and bool(self.codec.stop)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The column of the text."""
        return (self.column,)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Returns a document as one window."""
        text = read_text(row, self.column)
        return WindowExample(self._fields, text, num_bytes=len(text.encode()), num_words=len(text.split()))

    @property
    def _fields(self) -> dict[str, str]:
        """The fields of a window without context."""
        return {} if self.stride is None else {CONTEXT: ""}

    @property
    def _encoder(self) -> RowEncoder:
        return super()._encoder if self.stride is None else encode_context(super()._encoder)

    def _add_context(
        self, name: Split, examples: list[Example], origins: list[Origin]
    ) -> tuple[list[Example], list[Origin]]:
        """Returns the windows of a split with their contexts, which training and evaluations without stride lack."""
        if self.stride is None or name == "train":
            return examples, origins
        divide = partial(self._windows, size=self.stride)
        return divide_by_stride(examples, origins, divide, self.window - self.stride)

    def convert_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Divides the documents of a split into windows; empty documents have none.

        Raises:
            DataError: If a document cannot be read, or none has text.
        """
        rows = self.rows(name)
        examples: list[Example] = []
        origins: list[Origin] = []
        bad, num_empty = list(rows.skipped), 0
        for document, row in enumerate(rows):
            try:
                windows = self._windows(read_text(row, self.column), self.window)
            except ValueError as error:
                if self.on_bad_row == "raise":
                    raise DataError(f"{rows.where(document)}: {error}") from None
                bad.append(f"{rows.where(document)}: {error}")
                continue
            num_empty += not windows
            for number, window in enumerate(windows, start=1):
                is_last = number == len(windows)
                examples.append(
                    WindowExample(
                        self._fields,
                        window.text,
                        ends_text=is_last and name == "train" and self._trains_ends,
                        document=document,
                        num_bytes=window.num_bytes,
                        num_words=window.num_words,
                        corpus=self.corpus,
                    )
                )
                # The number of the window identifies a row of the predictions, as a document has several.
                origins.append(replace(rows.origin(document), index=len(origins)))
        if not examples:
            reason = f", the first problem: {bad[0]}" if bad else ""
            raise DataError(f"{rows.name} has no text in any of its {len(rows)} documents{reason}")
        if bad:
            log.warning("%d of the %s documents were skipped, the first: %s", len(bad), name, bad[0])
        if num_empty:
            log.info("%d of the %d %s documents are empty", num_empty, len(rows), name)
        return self._add_context(name, examples, origins)

    def _windows(self, text: str, size: int) -> list[Window]:
        """The windows of a document of at most a number of bytes, none of which exceeds max_tokens."""
        pending = list(cut_windows(text, size))[::-1]
        windows: list[Window] = []
        while pending:
            window = pending.pop()
            if self._fits(window):
                windows.append(window)
                continue
            if window.num_bytes <= MIN_WINDOW:
                raise ValueError(f"max_tokens={self.max_tokens} is too small for {window.text!r}; increase max_tokens")
            begins_inside = window.num_words < len(window.text.split())
            halves = list(cut_windows(window.text, max(MIN_WINDOW, -(-window.num_bytes // 2))))
            halves[0] = halves[0]._replace(num_words=halves[0].num_words - begins_inside)
            pending += halves[::-1]
        return windows

    def _fits(self, window: Window) -> bool:
        most = self._max_window_tokens
        return window.num_bytes < most or len(self.codec.ids(window.text)) <= most

    @cached_property
    def _max_window_tokens(self) -> int:
        """Maximum tokens of a window: max_tokens without the template, special tokens and the end of the text."""
        without_text = self.codec.encode(self.template.pieces({}), "")
        return self.max_tokens - len(without_text.ids) - 1

    def prepare_split(self, name: Split) -> CorpusRows:
        """Prepares the windows of a split, first of the main corpus, then of each further corpus."""
        is_stored = self.stream and name != "predict"
        rows = self._prepare_stored(name) if is_stored else super().prepare_split(name)
        of_corpus = f" of {self.corpus}" if self.corpus else ""
        self.log_once(f"{name}{of_corpus}: {describe_size(rows)}")
        parts = {"": rows}
        for corpus in self._further_corpora(name):
            try:
                parts[corpus] = cast(CorpusRows, self._module_of(corpus).split(name)).parts[""]
            except ValueError as error:
                raise DataError(f"corpus {corpus!r}: {error}") from error
        return CorpusRows.of(parts)

    def _prepare_stored(self, name: Split) -> PreparedRows:
        """The windows of a split of the main corpus, on disk."""
        is_held_out = self._is_held_out(name)
        rows = self.rows("train" if is_held_out else name)
        is_training = name == "train"
        size = self.window if is_training or self.stride is None else self.stride
        table = WindowTable.of(cast(StoredDocuments, rows.store), size)
        if is_held_out:
            documents = np.unique(table.documents)
            parts = self._row_source.divide_many(len(documents))
            check_parts(parts, len(documents))
            table = table.only(documents[parts[name]])
        if not len(table):
            raise DataError(f"{rows.name} has no text in any of its {len(rows)} documents")
        if rows.skipped:
            log.warning("%d of the %s documents were skipped, the first: %s", len(rows.skipped), name, rows.skipped[0])
        ends_documents = is_training and self._trains_ends
        encoder, most = self._encoder, self._max_window_tokens
        room = None if self.stride is None else self.window - size
        return StoredRows.of(rows, table, encoder, self.corpus, is_training, ends_documents, most, room)

    def rows_digest(self, name: Split) -> str:
        """Returns the number of rows of a split, with a digest of their texts and tokens."""
        rows = cast(CorpusRows, self.split(name))
        if not self.stream or name == "predict":
            return super().rows_digest(name)
        settings = [self.codec.fingerprint, self.template.text, self.max_tokens]
        fingerprint = content_key(settings if self.stride is None else [*settings, self.stride])
        stored = [cast(StoredRows, part) for part in rows.parts.values()]
        return "; ".join(part.rows_digest(fingerprint) for part in stored)

    def _further_corpora(self, name: Split) -> list[str]:
        """The further corpora that a split uses: all in an evaluation, and those with a rate in training."""
        names = {"train": self.rates, "predict": {}}.get(name, self.corpora)
        return [corpus for corpus in self.corpora if corpus in names]

    def _module_of(self, corpus: str) -> CorpusDataModule:
        """The data module of a further corpus."""
        if corpus not in self._modules:
            module = CorpusDataModule(**{**self._shared_arguments, "path": self.corpora[corpus]})
            module.codec, module.corpus = self.codec, corpus
            self._modules[corpus] = module
        return self._modules[corpus]

    @property
    def _shared_arguments(self) -> dict[str, Any]:
        """The arguments that further corpora share with the main corpus."""
        arguments = {name: value for name, value in self.arguments.items() if name not in OF_MAIN_CORPUS}
        return {**arguments, "backbone": self.spec}

    def build_loader(self, name: Split, order: Order) -> ResumableLoader:
        """Returns a loader whose batches are of one corpus, in training by `rates`."""
        rows = cast(CorpusRows, self.split(name))
        sampler = self._build_sampler(rows, name, order)
        if self.used_corruption is None:
            return ResumableLoader(rows, sampler, self.collate, num_workers=self.num_workers)
        is_training = order == "shuffled"
        seed = self.seed if is_training else EVALUATION_SEED
        corrupted = CorruptedRows(rows, seed, self.codec, self.used_corruption, self.template.glue)
        if is_training:
            sampler = EpochIndexedSampler(sampler, len(rows))
        return ResumableLoader(corrupted, sampler, self.collate, num_workers=self.num_workers)

    def _build_sampler(self, rows: CorpusRows, name: Split, order: Order) -> ResumableBatchSampler:
        samplers = [self.sampler_of_rows(part, name, order, self.ranks) for part in rows.parts.values()]
        if len(samplers) == 1:
            return samplers[0]
        counts = None
        if order == "shuffled":
            rates = [1 - sum(self.rates.values()), *(self.rates[corpus] for corpus in rows.parts if corpus)]
            counts = quotas(max(len(rates), round(len(samplers[0]) / rates[0])), rates)
        return MixedBatchSampler(samplers, counts, self.seed)

    def hold_out_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Holds out whole documents.

        Raises:
            ValueError: If there are too few documents.
        """
        if self._training_rows is None:
            self._training_rows = self.convert_rows("train")
        examples, origins = self._training_rows
        documents = [example.document for example in examples if isinstance(example, WindowExample)]
        firsts = {document: position for position, document in reversed(list(enumerate(documents)))}
        numbers = sorted(firsts)
        parts = self._row_source.divide([examples[firsts[number]] for number in numbers])
        check_parts(parts, len(numbers))
        chosen = {numbers[index] for index in parts[name]}
        rows = [row for row, document in enumerate(documents) if document in chosen]
        if name != "train":  # the end of a document is trained, but not scored
            windows = [replace(examples[row], ends_text=False) for row in rows]
            return self._add_context(name, windows, [origins[row] for row in rows])
        return [examples[row] for row in rows], [origins[row] for row in rows]
