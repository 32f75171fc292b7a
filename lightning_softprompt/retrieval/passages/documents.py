"""What is searched and what is found: documents, the passages that they are cut into, hits."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

DIGEST_BYTES = 16


class CorpusError(ValueError):
    """A corpus that cannot be indexed; the message says where, why and what to do."""


@dataclass(frozen=True)
class Document:
    """A text of the corpus.

    Args:
        id: What it is named by in the corpus, and in the answers to it.
        title: Its heading, or nothing. It is searched with every passage.
        text: All of it.
        source: Where it comes from, such as `corpus.jsonl:17`, a file or an address.
    """

    id: str
    title: str
    text: str
    source: str = ""


@dataclass(frozen=True)
class Passage:
    """A part of a document that is found as one.

    Args:
        document: The id of its document, which gold passages of questions are named by.
        title: The document's.
        text: Exactly `document.text[start:end]`.
        source: The document's.
        start: Its first character.
        end: The character behind its last.
    """

    document: str
    title: str
    text: str
    source: str
    start: int
    end: int

    @property
    def id(self) -> str:
        """The document's id and the place in it."""
        return f"{self.document}:{self.start}"

    @property
    def searched(self) -> str:
        """The text that is searched: title and text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Args:
        passage: The passage.
        score: How well it fits, the more the better; comparable within one search only.
    """

    passage: Passage
    score: float


def content_digest(text: str) -> bytes:
    r"""[16] of a text by its words: texts that differ in white space alone are the same.

    >>> content_digest("a  warm film") == content_digest(" a warm\nfilm")
    True
    """
    return blake2b(" ".join(text.split()).encode(), digest_size=DIGEST_BYTES).digest()
