"""An index that is opened for search. It is only read, so any number of processes can open it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np

from lightning_softprompt.retrieval.manifest import NAME as MANIFEST
from lightning_softprompt.retrieval.manifest import BadIndexError, Manifest, read_manifest
from lightning_softprompt.retrieval.passages.text_files import Passages
from lightning_softprompt.retrieval.search.bm25 import Lexical
from lightning_softprompt.retrieval.search.fusion import Ranking
from lightning_softprompt.retrieval.search.qdrant import QdrantVectors
from lightning_softprompt.retrieval.search.vectors import FileVectors, VectorStore
from lightning_softprompt.retrieval.trusted_names import check_trusted

LEXICAL, DENSE, EMBEDDED = "lexical", "dense", "qdrant"  # folders; the last in the index itself
MIN_SIMILARITY = 0.999  # minimum product of two vectors of a text by the same encoder, on any devices
MAX_TRIES = 20


@final
class Index:
    """The state of an index at the time of opening, which later builds do not change. Unpickling opens it again.

    Args:
        folder: Folder of the index.

    Raises:
        BadIndexError: If there is no index, or it is damaged or has another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest, self.passages, self.bm25, self._store = _open(self.folder)
        self._is_checked = False

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def files(self) -> Path:
        """The folder with the files of this state of the index."""
        return self.folder / self.manifest.generation

    @property
    def vector_store(self) -> VectorStore:
        """The vectors for dense search. The first use checks that the encoder is the one that built the index.

        Raises:
            ValueError: If the index has no vectors, or was built with another encoder.
        """
        if self._store is None:
            raise ValueError(
                f"{self.folder} has no vectors, since it was built without an encoder; use mode lexical, or build it "
                "with an encoder"
            )
        if not self._is_checked:
            self._check_encoder(self._store)
        return self._store

    def _check_encoder(self, store: VectorStore) -> None:
        from lightning_softprompt.retrieval.search.encoder import load_encoder

        name = str(self.manifest.settings.encoder)
        check_trusted(self.folder, self.manifest.settings, encoder=True)
        new, stored = load_encoder(name).passages([self.passages[0].searched])[0], store.first_vector()
        if new.shape != stored.shape or float(new @ stored) < MIN_SIMILARITY:
            raise ValueError(
                f"the encoder {name!r} is not the one that {self.folder} was built with: its vectors differ. Restore "
                "the old weights, or build the index again in another folder"
            )
        self._is_checked = True

    def lexical(self, questions: Sequence[str], k: int) -> list[Ranking]:
        """Returns the k best passages for each question by BM25."""
        return [self.bm25.search(question, k) for question in questions]

    def dense(self, questions: Sequence[str], k: int) -> list[Ranking]:
        """Returns the k nearest passages for each question."""
        from lightning_softprompt.retrieval.search.encoder import load_encoder

        store = self.vector_store
        encoder = load_encoder(str(self.manifest.settings.encoder))
        return store.search(encoder.questions(questions), k)


def open_store(folder: Path, files: Path, manifest: Manifest, passages: Passages | None) -> VectorStore:
    """Returns the vector store of an index."""
    settings = manifest.settings
    if settings.store == "qdrant":
        digests = None if passages is None else np.asarray(passages.digests)
        return QdrantVectors(folder / EMBEDDED, settings.url, manifest.collection, digests)
    return FileVectors(files / DENSE, settings.store)


OpenFiles = tuple[Manifest, Passages, Lexical, VectorStore | None]


def _open(folder: Path) -> OpenFiles:
    """Opens the manifest and the files that it names; tries again if a build replaced them in between."""
    for _ in range(MAX_TRIES):
        before = _read_manifest_bytes(folder)
        try:
            return _open_files(folder, read_manifest(folder))
        except (BadIndexError, FileNotFoundError):
            if _read_manifest_bytes(folder) == before:
                raise
    raise BadIndexError(f"{folder} is rebuilt continuously; try again after the build")


def _open_files(folder: Path, manifest: Manifest) -> OpenFiles:
    files = folder / manifest.generation
    passages = Passages(files)
    lexical = Lexical(files / LEXICAL, manifest.settings.language)
    if manifest.settings.encoder is None:
        return manifest, passages, lexical, None
    check_trusted(folder, manifest.settings, encoder=False)
    store = open_store(folder, files, manifest, passages)
    store.open()
    return manifest, passages, lexical, store


def _read_manifest_bytes(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        return b""
