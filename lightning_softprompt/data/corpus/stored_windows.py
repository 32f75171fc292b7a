"""Windows of documents on disk: their positions are in memory, their text and tokens are read when they are used."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar, final

import numpy as np

from lightning_softprompt.core.types import Encoded, Example, WindowExample
from lightning_softprompt.data.corpus.stored_documents import Integers, StoredDocuments, load_or_index
from lightning_softprompt.data.corpus.strides import CONTEXT
from lightning_softprompt.data.corpus.windows import cut_windows, find_context
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.readers.rows import DataError, Origin, Rows
from lightning_softprompt.data.splits.row_encoder import RowEncoder
from lightning_softprompt.data.token_cache import content_key

T = TypeVar("T")
SAMPLE = 1000  # rows whose tokens describe a split


@dataclass(frozen=True, eq=False)
class LazySequence(Sequence[T]):
    """A sequence whose items are computed when they are used.

    Args:
        length: Number of items.
        compute: Computes the item of an index.
    """

    length: int
    compute: Callable[[int], T]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> T:  # type: ignore[override]
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} of {self.length} items")
        return self.compute(index % self.length)


@dataclass(frozen=True, eq=False)
class WindowTable:
    """The positions of windows.

    Args:
        starts: [R] first byte of each window in the text of all documents.
        sizes: [R] bytes.
        words: [R] words that begin in the window.
        documents: [R] number of the document.
        numbers: [R] number of the window in its source.
        is_last: [R] whether the window is the last one of its document.
    """

    starts: Integers
    sizes: Integers
    words: Integers
    documents: Integers
    numbers: Integers
    is_last: Integers

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def of(cls, documents: StoredDocuments, size: int) -> WindowTable:
        """The windows of all documents, which are computed once and stored with the documents."""
        columns = load_or_index(documents.folder, f"windows-{size}", lambda: _cut(documents, size))
        numbers = np.arange(len(columns["starts"]))
        is_last = np.append(np.diff(columns["documents"]), 1)
        return cls(**columns, numbers=numbers, is_last=is_last)

    def only(self, documents: Integers) -> WindowTable:
        """The windows of some documents."""
        selected = np.isin(self.documents, documents)
        return WindowTable(
            self.starts[selected],
            self.sizes[selected],
            self.words[selected],
            self.documents[selected],
            self.numbers[selected],
            self.is_last[selected],
        )


def _cut(documents: StoredDocuments, size: int) -> dict[str, Integers]:
    starts, sizes, words, numbers = array("q"), array("q"), array("q"), array("q")
    for document in range(len(documents)):
        start = int(documents.starts[document])
        for window in cut_windows(documents[document][documents.column], size):
            starts.append(start)
            sizes.append(window.num_bytes)
            words.append(window.num_words)
            numbers.append(document)
            start += window.num_bytes
    columns = {"starts": starts, "sizes": sizes, "words": words, "documents": numbers}
    return {name: np.array(values, np.int64) for name, values in columns.items()}


@final
@dataclass(frozen=True)
class StoredRows(PreparedRows):
    """The windows of a split on disk. `lengths` are bytes, by which rows are grouped into batches.

    Args:
        table: The positions of the windows.
        digest: A hash of the text of all documents of the source.
    """

    table: WindowTable
    digest: str

    @classmethod
    def of(
        cls,
        rows: Rows,
        table: WindowTable,
        encoder: RowEncoder,
        corpus: str,
        truncates: bool,
        ends_documents: bool,
        max_text_tokens: int,
        context_size: int | None = None,
    ) -> StoredRows:
        """The windows of a table.

        Args:
            rows: The documents.
            table: The windows.
            encoder: Converts a window to tokens.
            corpus: Name of the corpus.
            truncates: Whether windows with too many tokens are truncated, or refused.
            ends_documents: Whether the last window of a document ends with the token that stops generation.
            max_text_tokens: Maximum tokens of a window.
            context_size: Maximum bytes of the text before a window, as context without loss; None if rows have none.
        """
        reader = _Reader(rows, table, encoder, corpus, truncates, ends_documents, max_text_tokens, context_size)
        count = len(table)
        examples: Sequence[Example] = LazySequence(count, reader.example)
        encoded: Sequence[Encoded] = LazySequence(count, reader.encode)
        origins: Sequence[Origin] = LazySequence(count, reader.origin)
        return cls(examples, encoded, origins, table, reader.documents.digest)

    @property
    def lengths(self) -> Sequence[int]:
        """Bytes of each window."""
        return self.table.sizes  # type: ignore[return-value]

    @cached_property
    def sample(self) -> PreparedRows:
        """Some of the rows, at equal distances, in memory."""
        step = max(1, len(self) // SAMPLE)
        numbers = range(0, len(self), step)
        examples = [self.examples[number] for number in numbers]
        encoded = [self.encoded[number] for number in numbers]
        return PreparedRows(examples, encoded, [self.origins[number] for number in numbers])

    def rows_digest(self, fingerprint: str) -> str:
        """Returns the number of rows, with a digest of their texts and positions.

        Args:
            fingerprint: A hash of everything else that determines the tokens.
        """
        key = content_key([self.digest, self.table.starts.tobytes(), self.table.sizes.tobytes(), fingerprint])
        return f"{len(self)} rows ({key[:12]})"


@final
@dataclass(frozen=True)
class _Reader:
    """Reads windows by their index. Picklable, so that data workers can use it."""

    rows: Rows
    table: WindowTable
    encoder: RowEncoder
    corpus: str
    truncates: bool
    ends_documents: bool
    max_text_tokens: int
    context_size: int | None

    @property
    def documents(self) -> StoredDocuments:
        store = self.rows.store
        assert isinstance(store, StoredDocuments)
        return store

    def example(self, index: int) -> WindowExample:
        table = self.table
        size = int(table.sizes[index])
        return WindowExample(
            {} if self.context_size is None else {CONTEXT: self._read_context(index, self.context_size)},
            self.documents.read(int(table.starts[index]), size),
            ends_text=self.ends_documents and bool(table.is_last[index]),
            document=int(table.documents[index]),
            num_bytes=size,
            num_words=int(table.words[index]),
            corpus=self.corpus,
        )

    def _read_context(self, index: int, size: int) -> str:
        """The text before a window in its document."""
        first = int(self.documents.starts[self.table.documents[index]])
        end = int(self.table.starts[index])
        start = max(first, end - size - 1)  # a document with one more byte is cut
        content = self.documents.read_bytes(start, end - start)
        return content[find_context(content, len(content), size) :].decode()

    def origin(self, index: int) -> Origin:
        origin = self.rows.origin(int(self.table.documents[index]))
        return replace(origin, index=int(self.table.numbers[index]))

    def encode(self, index: int) -> Encoded:
        example = self.example(index)
        count = 0
        if example.num_bytes >= self.max_text_tokens:
            count = len(self.encoder.codec.ids(example.target))
        surplus = max(0, count - self.max_text_tokens)
        if surplus and not self.truncates:
            raise DataError(
                f"{self.origin(index).where}: a window has {count} tokens, more than the {self.max_text_tokens} that "
                "max_tokens allows, and with data.stream windows are not divided; decrease data.window"
            )
        encoder = replace(self.encoder, max_target_tokens=self.max_text_tokens) if surplus else self.encoder
        return encoder.encode(example)._replace(num_truncated=surplus)
