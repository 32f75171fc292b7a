"""Documents on disk and the positions of their passages: one JSON line per document, with random access.

A passage is stored as a row [document, start, end]; its text is a slice of the text of the document.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from lightning_softprompt.retrieval.passages.chunking import Chunking
from lightning_softprompt.retrieval.passages.documents import (
    DIGEST_BYTES,
    CorpusError,
    Document,
    Passage,
    content_digest,
)

LINES, PLACES, PASSAGES, DIGESTS = "documents.jsonl", "documents.npy", "passages.npy", "digests.npy"
IDS, COPIES = "ids.npy", "copies.npy"
KEPT = 256  # documents


def write_documents(folder: Path, documents: Iterable[Document]) -> tuple[str, int]:
    """Writes documents; returns a hash and the number of documents.

    A document that occurs again with the same id and content is written once.

    Raises:
        CorpusError: If two different documents have the same id, or there are no documents.
    """
    seen: dict[str, tuple[bytes, str]] = {}
    total, places = sha256(), [0]
    with (folder / LINES).open("wb") as file:
        for document in documents:
            if _is_new(document, seen):
                line = json.dumps(vars(document), ensure_ascii=False).encode() + b"\n"
                file.write(line)
                total.update(line)
                places.append(places[-1] + len(line))
    if not seen:
        raise CorpusError("the corpus has no documents; an index requires at least one")
    np.save(folder / PLACES, np.array(places, np.int64))
    ids = sorted((_id_hash(id), number) for number, id in enumerate(seen))
    np.save(folder / IDS, np.array(ids, np.uint64))
    return total.hexdigest(), len(seen)


def _id_hash(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest())


def _is_new(document: Document, seen: dict[str, tuple[bytes, str]]) -> bool:
    digest = content_digest(f"{document.title}\n{document.text}")
    if document.id not in seen:
        seen[document.id] = digest, document.source
        return True
    if seen[document.id][0] != digest:
        raise CorpusError(
            f"{document.source}: the id {document.id!r} belongs to another document at {seen[document.id][1]}. "
            "Use a unique id for each document"
        )
    return False


def write_passages(folder: Path, chunking: Chunking, documents: Iterable[Document]) -> int:
    """Splits documents into passages; returns the number of passages that are left out as duplicates.

    Raises:
        CorpusError: If no document has a word.
    """
    rows: list[tuple[int, int, int]] = []
    copies: list[tuple[int, int, int]] = []  # document, start, and the row with the same content
    digests: dict[bytes, int] = {}
    for number, document in enumerate(documents):
        for passage in split_document(document, chunking):
            digest = content_digest(passage.searched)
            if digest in digests:
                copies.append((number, passage.start, digests[digest]))
                continue
            digests[digest] = len(rows)
            rows.append((number, passage.start, passage.end))
    if not rows:
        raise CorpusError("no document of the corpus has a word; check that the right column or files are read")
    np.save(folder / PASSAGES, np.array(rows, np.int64))
    np.save(folder / DIGESTS, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES))
    np.save(folder / COPIES, np.array(copies, np.int64).reshape(-1, 3))
    return len(copies)


def split_document(document: Document, chunking: Chunking) -> Iterator[Passage]:
    """Yields the passages of a document in order."""
    for start, end in chunking.spans(document.text):
        yield passage_at(document, start, end)


def passage_at(document: Document, start: int, end: int) -> Passage:
    """Returns a part of a document as a passage."""
    return Passage(document.id, document.title, document.text[start:end], document.source, start, end)


@final
class Texts:
    """The documents of an index, mapped into memory for reading.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        with (folder / LINES).open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._places = np.load(folder / PLACES, mmap_mode="r")  # [D + 1]
        self._ids: NDArray[np.uint64] = np.load(
            folder / IDS, mmap_mode="r"
        )  # [D, 2]: hash of an id, sorted; its number
        self.document = lru_cache(maxsize=KEPT)(self._document)

    def __len__(self) -> int:
        return len(self._places) - 1

    def __iter__(self) -> Iterator[Document]:
        return map(self._document, range(len(self)))

    def number(self, id: str) -> int | None:
        """Returns the number of the document with an id; None if there is none."""
        id_hash = np.uint64(_id_hash(id))
        first = int(np.searchsorted(self._hashes, id_hash))
        last = int(np.searchsorted(self._hashes, id_hash, side="right"))
        numbers = (int(number) for number in self._ids[first:last, 1])
        return next((number for number in numbers if self.document(number).id == id), None)

    @cached_property
    def _hashes(self) -> NDArray[np.uint64]:
        return np.ascontiguousarray(self._ids[:, 0])

    def _document(self, number: int) -> Document:
        start, end = self._places[number : number + 2].tolist()
        return Document(**json.loads(self._lines[start:end]))


@final
class Passages:
    """The passages of an index by row.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.texts = Texts(folder)
        self.rows: NDArray[np.int64] = np.load(folder / PASSAGES, mmap_mode="r")  # [n, 3]: document, start, end
        self.digests: NDArray[np.uint8] = np.load(folder / DIGESTS, mmap_mode="r")  # [n, 16]
        # [m, 3]: duplicates that were left out, by document and start, with the row that has the same content
        self.copies: NDArray[np.int64] = np.load(folder / COPIES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Passage:
        number, start, end = self.rows[row].tolist()
        return passage_at(self.texts.document(number), start, end)

    def by_digest(self) -> dict[bytes, int]:
        """Returns the row of each digest."""
        return {digest.tobytes(): row for row, digest in enumerate(self.digests)}

    def rows_of(self, document: str) -> tuple[int, ...]:
        """Returns the rows with the content of the passages of a document, in order; none for an unknown document.

        The index stores one of several passages with equal content, so a row can belong to another document.
        """
        number = self.texts.number(document)
        if number is None:
            return ()
        first, last = np.searchsorted(self._row_documents, (number, number + 1)).tolist()
        stored = [(int(self.rows[row, 1]), row) for row in range(first, last)]
        first, last = np.searchsorted(self._copy_documents, (number, number + 1)).tolist()
        copies = [(start, row) for _, start, row in self.copies[first:last].tolist()]
        return tuple(dict.fromkeys(row for _, row in sorted(stored + copies)))

    @cached_property
    def _row_documents(self) -> NDArray[np.int64]:
        return np.ascontiguousarray(self.rows[:, 0])

    @cached_property
    def _copy_documents(self) -> NDArray[np.int64]:
        return np.ascontiguousarray(self.copies[:, 0])
