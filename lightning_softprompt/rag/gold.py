"""Gold documents of questions: finds their passages by content, and reports ids that the index lacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import final

from lightning_softprompt.retrieval.passages.documents import Passage, content_digest
from lightning_softprompt.retrieval.passages.text_files import Passages

log = logging.getLogger(__name__)
CACHE_SIZE = 4096  # questions
EXAMPLES = 3  # ids in a message


def read_ids(ids: object, column: str) -> tuple[str, ...]:
    """Returns the document ids of a row as text.

    Raises:
        ValueError: If the value is not a list of texts and integers.
    """
    if not isinstance(ids, list | tuple) or not all(_is_id(id) for id in ids):
        raise ValueError(f"column {column!r} must be a list of document ids, got {ids!r}")
    return tuple(str(int(id)) if isinstance(id, float) else str(id) for id in ids)


def _is_id(id: object) -> bool:
    return isinstance(id, str | int) or (isinstance(id, float) and id.is_integer())


@final
class GoldPassages:
    """Finds the passages of gold documents in an index, and recognizes passages with the same text.

    A corpus may contain a text several times under different ids. If one of them is gold, all passages with this text
    are attributed to the gold document, in training, citation and scoring.

    Args:
        passages: The passages of the index.
    """

    def __init__(self, passages: Passages) -> None:
        self.passages = passages
        self._documents_by_text = lru_cache(maxsize=CACHE_SIZE)(self._read)

    def documents(self, passage: Passage, gold: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the gold documents that contain the text of a passage."""
        return self._documents_by_text(gold).get(content_digest(passage.text), ()) if gold else ()

    def attribute(self, passage: Passage, gold: tuple[str, ...]) -> Passage:
        """Returns the passage with the first gold document that contains its text, if any, as its document."""
        documents = self.documents(passage, gold)
        return replace(passage, document=documents[0]) if documents else passage

    def rows(self, gold: tuple[str, ...]) -> list[int]:
        """Returns the index rows of the passages of gold documents, without duplicate texts."""
        by_text: dict[bytes, int] = {}
        for document in gold:
            for row in self.passages.rows_of(document):
                by_text.setdefault(content_digest(self.passages[row].text), row)
        return list(by_text.values())

    def distinct(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Returns the ids without those of documents that are copies of an earlier one."""
        id_by_content: dict[frozenset[bytes] | str, str] = {}
        for id in ids:
            texts = frozenset(content_digest(self.passages[row].text) for row in self.passages.rows_of(id))
            id_by_content.setdefault(texts or id, id)
        return tuple(id_by_content.values())

    def _read(self, gold: tuple[str, ...]) -> dict[bytes, tuple[str, ...]]:
        documents: dict[bytes, tuple[str, ...]] = {}
        for document in gold:
            for row in self.passages.rows_of(document):
                text = content_digest(self.passages[row].text)
                documents[text] = tuple(dict.fromkeys((*documents.get(text, ()), document)))
        return documents


@final
class GoldCheck:
    """Counts the rows of a split whose gold documents are not in the index.

    Args:
        passages: The passages of the index.
        index: Its folder, for messages.
        column: The column with the ids, for messages.
    """

    def __init__(self, passages: Passages, index: str, column: str) -> None:
        self.passages, self.index, self.column = passages, index, column
        self.rows, self.known = 0, 0
        self.missing: list[str] = []  # one unknown id of each row that has any

    def add(self, gold: Sequence[str]) -> None:
        """Counts a row."""
        absent = [id for id in gold if not self.passages.rows_of(id)]
        self.rows += bool(gold)
        self.known += len(absent) < len(gold)
        self.missing += absent[:1]

    def report(self, split: str) -> None:
        """Warns of ids that the index lacks. If it lacks all of them, the corpus probably uses other ids."""
        if self.rows and not self.known:
            documents = [self.passages.texts.document(n).id for n in range(min(EXAMPLES, len(self.passages.texts)))]
            log.warning(
                "none of the %d %s rows has a gold document that is in %s, so all retrieval metrics are 0: column %r "
                "has %s, the index has %s. Set data.corpus_columns.id (--id-column of `softprompt index build`) to the "
                "column of the ids in the corpus, or correct the ids",
                self.rows, split, self.index, self.column, self.missing[:EXAMPLES], documents,
            )  # fmt: skip
        elif self.missing:
            log.warning(
                "%d of the %d %s rows have gold documents that %s lacks, for example %r; they count as not retrieved",
                len(self.missing), self.rows, split, self.index, self.missing[0],
            )  # fmt: skip
