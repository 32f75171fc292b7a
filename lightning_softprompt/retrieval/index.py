"""An index, opened to search. Nothing is ever written to it here, so any number of processes may have it open."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np

from lightning_softprompt.retrieval.lexical import Lexical
from lightning_softprompt.retrieval.manifest import BadIndexError, Manifest, read_manifest
from lightning_softprompt.retrieval.qdrant import QdrantVectors
from lightning_softprompt.retrieval.ranking import Ranking
from lightning_softprompt.retrieval.texts import Passages
from lightning_softprompt.retrieval.vectors import FileVectors, VectorStore

LEXICAL, DENSE, EMBEDDED = "lexical", "dense", "qdrant"  # folders; the last in the index itself
SAME = 0.999  # product of two vectors of one text by the same encoder, on whatever device
TRIES = 5


@final
class Index:
    """An index as it was when it was opened, whatever is built meanwhile. Pickled, it is opened again.

    Args:
        folder: Where it was built.

    Raises:
        BadIndexError: If there is none, or it is damaged, or of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest, self.passages = _opened(self.folder)

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def files(self) -> Path:
        """The folder that holds this state of the index."""
        return self.folder / self.manifest.generation

    @cached_property
    def by_words(self) -> Lexical:
        """Lexical search.

        Raises:
            ValueError: If bm25s is not installed.
        """
        return Lexical(self.files / LEXICAL, self.manifest.settings.language)

    @cached_property
    def by_vectors(self) -> VectorStore:
        """Dense search, once the encoder was seen to be the one that the index was built with.

        Raises:
            ValueError: If the index has no vectors, or the encoder is another.
        """
        name = self.manifest.settings.encoder
        if name is None:
            raise ValueError(
                f"{self.folder} has no vectors, since it was built without an encoder; search it by lexical, or build "
                "it with an encoder"
            )
        found = store_of(self.folder, self.files, self.manifest, self.passages)
        from lightning_softprompt.retrieval.encoding import encoder

        here = encoder(name).passages([self.passages[0].searched])[0]
        there = found.first()
        if here.shape != there.shape or float(here @ there) < SAME:
            raise ValueError(
                f"the encoder {name!r} is not the one that {self.folder} was built with: it gives other vectors. Bring "
                "back the old weights, or build the index anew in another folder"
            )
        return found

    def lexical(self, questions: Sequence[str], k: int) -> list[Ranking]:
        """The k best passages for each question by BM25."""
        return [self.by_words.search(question, k) for question in questions]

    def dense(self, questions: Sequence[str], k: int) -> list[Ranking]:
        """The k nearest passages for each question."""
        store = self.by_vectors
        from lightning_softprompt.retrieval.encoding import encoder

        vectors = encoder(str(self.manifest.settings.encoder)).questions(questions)
        return store.search(vectors, k)


def store_of(folder: Path, files: Path, manifest: Manifest, passages: Passages | None) -> VectorStore:
    """Where the vectors of an index are."""
    settings = manifest.settings
    if settings.store == "qdrant":
        digests = None if passages is None else np.asarray(passages.digests)
        return QdrantVectors(folder / EMBEDDED, settings.url, manifest.collection, digests)
    return FileVectors(files / DENSE, settings.store)


def _opened(folder: Path) -> tuple[Manifest, Passages]:
    """The manifest and what it names; tried again where a build took it away in between."""
    before: Manifest | None = None
    for _ in range(TRIES):
        try:
            manifest = read_manifest(folder)
            return manifest, Passages(folder / manifest.generation)
        except (BadIndexError, FileNotFoundError):
            now = _generation(folder)
            if now is None or (before is not None and before.generation == now.generation):
                raise
            before = now
    raise BadIndexError(f"{folder} is built anew all the time; try again once that has ended")


def _generation(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except BadIndexError:
        return None
