"""Stores and searches the vectors of passages: in files of the index, by FAISS.

Vectors are stored in one array that is mapped into memory. `flat` compares a question with all vectors; `ivf` with the
vectors of the nearest cells (Sivic & Zisserman 2003); `hnsw` walks a graph of neighbors (Malkov & Yashunin 2018, arXiv
1603.09320).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from lightning_softprompt.retrieval.search.fusion import Floats, Ranking, Rows
from lightning_softprompt.system.optional_packages import import_optional

VECTORS, GRAPH = "vectors.npy", "vectors.faiss"
Encode = Callable[[Rows], Iterator[tuple[Rows, Floats]]]  # yields [m] of the rows at a time, and their vectors [m, H]
SEED = 13
NEIGHBORS, EFFORT = 32, 128  # of hnsw: links of a vector, candidates at building and searching
PER_CELL = 64  # vectors per ivf cell; faiss requires 39 to compute its centroid
VISITED = 0.1  # share of the ivf cells that are searched


class VectorStore(ABC):
    """Stores and searches the vectors of passages. A passage is identified by a digest of its content."""

    @abstractmethod
    def open(self) -> None:
        """Opens the files that a later build may remove."""

    @abstractmethod
    def write(self, digests: NDArray[np.uint8], encode: Encode, kept: Vectors | None) -> int:
        """Writes a vector for each passage; returns H.

        Args:
            digests: Digests [n, 16] of the passages.
            encode: Encodes rows.
            kept: Vectors of an earlier state of the index, by digest.
        """

    @abstractmethod
    def prune(self, digests: NDArray[np.uint8]) -> None:
        """Removes the vectors of all other passages, after the manifest is written."""

    @abstractmethod
    def search(self, questions: Floats, k: int) -> list[Ranking]:
        """Returns the k passages whose vectors are nearest to each of [Q, H]."""

    @abstractmethod
    def first_vector(self) -> Floats:
        """Returns the vector [H] of the first passage, which identifies the encoder."""

    @abstractmethod
    def delete(self) -> None:
        """Removes all vectors."""

    @abstractmethod
    def close(self) -> None:
        """Closes the store."""


class Vectors:
    """Stored vectors.

    Args:
        rows: The row of each digest.
        vectors: [n, H]
    """

    def __init__(self, rows: Mapping[bytes, int], vectors: Floats) -> None:
        self.rows, self.vectors = rows, vectors

    def find(self, digests: NDArray[np.uint8]) -> Rows:
        """Returns the row [n] of each digest, -1 for an unknown digest."""
        return np.array([self.rows.get(digest.tobytes(), -1) for digest in digests], np.int64)


@final
class FileVectors(VectorStore):
    """Vectors in files of the index.

    Args:
        folder: Folder of the files.
        store: `flat`, `ivf` or `hnsw`.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store

    @cached_property
    def vectors(self) -> Floats:
        """[n, H], mapped into memory."""
        found: Floats = np.load(self.folder / VECTORS, mmap_mode="r")
        return found

    def open(self) -> None:
        """Maps the files into memory."""
        if len(self.vectors) and self.store != "flat":
            assert self._faiss.ntotal == len(self.vectors), "one graph for all vectors"

    def write(self, digests: NDArray[np.uint8], encode: Encode, kept: Vectors | None) -> int:
        """Copies the kept vectors, and encodes the others."""
        faiss = import_optional("faiss")
        old = kept.find(digests) if kept else np.full(len(digests), -1)
        made = encode(np.flatnonzero(old < 0))
        first = next(made, None)
        width = first[1].shape[1] if first else 0
        if kept and first is None:
            width = kept.vectors.shape[1]
        vectors = open_memmap(self.folder / VECTORS, "w+", np.float32, (len(digests), width))
        if kept:
            vectors[old >= 0] = kept.vectors[old[old >= 0]]
        for rows, values in [first, *made] if first else ():
            vectors[rows] = values
        vectors.flush()
        if self.store != "flat":
            faiss.write_index(_build_graph(faiss, vectors, self.store), str(self.folder / GRAPH))
        return width

    def prune(self, digests: NDArray[np.uint8]) -> None:
        """Does nothing: the folder contains only these passages."""

    def delete(self) -> None:
        """Does nothing: the vectors are removed with their folder."""

    def close(self) -> None:
        """Does nothing: any number of processes can open the files."""

    def search(self, questions: Floats, k: int) -> list[Ranking]:
        """Returns the k nearest passages of each question, by FAISS."""
        k = min(k, len(self.vectors))
        if self.store == "flat":
            faiss = import_optional("faiss")
            scores, rows = faiss.knn(questions, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores, rows = self._faiss.search(questions, k)
        rankings = []
        for question_rows, question_scores in zip(rows.astype(np.int64), scores, strict=True):
            is_valid = question_rows >= 0  # FAISS fills missing results with -1
            rankings.append(Ranking(question_rows[is_valid], question_scores[is_valid]))
        return rankings

    def first_vector(self) -> Floats:
        """Returns the vector [H] of the first passage."""
        return np.array(self.vectors[0])

    @cached_property
    def _faiss(self) -> Any:
        faiss = import_optional("faiss")
        found = faiss.read_index(str(self.folder / GRAPH), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        return _set_search_effort(found, self.store)


def _build_graph(faiss: Any, vectors: Floats, store: str) -> Any:
    n, width = vectors.shape
    if store == "hnsw":
        index = faiss.IndexHNSWFlat(width, NEIGHBORS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EFFORT
    else:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, max(1, n // PER_CELL), faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = SEED
        index.train(np.asarray(vectors))
    index.add(np.asarray(vectors))
    return index


def _set_search_effort(index: Any, store: str) -> Any:
    if store == "hnsw":
        index.hnsw.efSearch = EFFORT
    else:
        index.nprobe = max(8, round(index.nlist * VISITED))
    return index
