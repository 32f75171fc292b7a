"""The gold documents of questions: their passages, recognized by content, and ids that the index lacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import final

from lightning_softprompt.retrieval.passages.documents import Passage, content_digest
from lightning_softprompt.retrieval.passages.text_files import Passages

log = logging.getLogger(__name__)
CACHED = 4096  # questions
EXAMPLES = 3  # ids that a message shows


def read_ids(ids: object, column: str) -> tuple[str, ...]:
    """The ids of documents in a row, as text.

    Raises:
        ValueError: If they are not a list of texts and whole numbers.
    """
    if not isinstance(ids, list | tuple) or not all(_is_id(id) for id in ids):
        raise ValueError(f"column {column!r} must be a list of ids of documents, got {ids!r}")
    return tuple(str(int(id)) if isinstance(id, float) else str(id) for id in ids)


def _is_id(id: object) -> bool:
    return isinstance(id, str | int) or (isinstance(id, float) and id.is_integer())


@final
class GoldPassages:
    """Finds the passages of gold documents in an index, and recognizes passages with the same text.

    A corpus may hold a text several times, under several ids. Whichever of them is gold, all passages with that text
    are: each is named by the gold document whose text it has, wherever it is shown, cited, trained on or scored.

    Args:
        passages: The passages of the index.
    """

    def __init__(self, passages: Passages) -> None:
        self.passages = passages
        self._documents_by_text = lru_cache(maxsize=CACHED)(self._read)

    def documents(self, passage: Passage, gold: tuple[str, ...]) -> tuple[str, ...]:
        """The gold documents that a passage's text is in; empty if it is in none."""
        return self._documents_by_text(gold).get(content_digest(passage.text), ()) if gold else ()

    def named(self, passage: Passage, gold: tuple[str, ...]) -> Passage:
        """The passage as one of the first gold document that has its text, or as it is."""
        documents = self.documents(passage, gold)
        return replace(passage, document=documents[0]) if documents else passage

    def rows(self, gold: tuple[str, ...]) -> list[int]:
        """The passages of gold documents as rows of the index, document by document, each text once."""
        by_text: dict[bytes, int] = {}
        for document in gold:
            for row in self.passages.rows_of(document):
                by_text.setdefault(content_digest(self.passages[row].text), row)
        return list(by_text.values())

    def distinct(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Ids without those of documents that are copies of an earlier one."""
        kept: dict[frozenset[bytes] | str, str] = {}
        for id in ids:
            texts = frozenset(content_digest(self.passages[row].text) for row in self.passages.rows_of(id))
            kept.setdefault(texts or id, id)
        return tuple(kept.values())

    def _read(self, gold: tuple[str, ...]) -> dict[bytes, tuple[str, ...]]:
        found: dict[bytes, tuple[str, ...]] = {}
        for document in gold:
            for row in self.passages.rows_of(document):
                text = content_digest(self.passages[row].text)
                found[text] = tuple(dict.fromkeys((*found.get(text, ()), document)))
        return found


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
        self.lacking: list[str] = []  # one id of each row that has an unknown one

    def add(self, gold: Sequence[str]) -> None:
        """Counts a row."""
        absent = [id for id in gold if not self.passages.rows_of(id)]
        self.rows += bool(gold)
        self.known += len(absent) < len(gold)
        self.lacking += absent[:1]

    def report(self, split: str) -> None:
        """Warns of ids that the index lacks. If it lacks all of them, the ids of the corpus are other ones."""
        if self.rows and not self.known:
            documents = [self.passages.texts.document(n).id for n in range(min(EXAMPLES, len(self.passages.texts)))]
            log.warning(
                "none of the %d %s rows has a gold document that is in %s, so all measures of retrieval are 0: column "
                "%r has %s, the index has %s. Name the column of the corpus that holds the ids by "
                "data.corpus_columns.id (--id-column of `softprompt index build`), or correct the ids",
                self.rows, split, self.index, self.column, self.lacking[:EXAMPLES], documents,
            )  # fmt: skip
        elif self.lacking:
            log.warning(
                "%d of the %d %s rows name gold documents that %s lacks, the first: %r; they count as not found",
                len(self.lacking), self.rows, split, self.index, self.lacking[0],
            )  # fmt: skip
