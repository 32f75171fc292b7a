"""Documents, the passages that they are split into, and search hits."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

DIGEST_BYTES = 16


class CorpusError(ValueError):
    """A corpus that cannot be indexed. The message gives the position, the reason and what to do."""


@dataclass(frozen=True)
class Document:
    """A text of the corpus.

    Args:
        id: Its id in the corpus, which questions use to name their gold documents.
        title: Its title, or an empty text. Each passage is searched together with the title.
        text: The full text.
        source: Its origin, such as `corpus.jsonl:17`, a file or an address.
    """

    id: str
    title: str
    text: str
    source: str = ""


@dataclass(frozen=True)
class Passage:
    """A part of a document that is retrieved as a unit.

    Args:
        document: The id of its document.
        title: Title of the document.
        text: Exactly `document.text[start:end]`.
        source: Source of the document.
        start: Its first character.
        end: The position after its last character.
    """

    document: str
    title: str
    text: str
    source: str
    start: int
    end: int

    @property
    def id(self) -> str:
        """The id of the document and the position in it."""
        return f"{self.document}:{self.start}"

    @property
    def searched(self) -> str:
        """The text that is searched: title and text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class Hit:
    """A retrieved passage.

    Args:
        passage: The passage.
        score: Its score; higher is better. Scores are comparable only within one search.
    """

    passage: Passage
    score: float


def content_digest(text: str) -> bytes:
    r"""Returns a digest [16] of a text, which ignores differences in white space.

    >>> content_digest("a  warm film") == content_digest(" a warm\nfilm")
    True
    """
    return blake2b(" ".join(text.split()).encode(), digest_size=DIGEST_BYTES).digest()
