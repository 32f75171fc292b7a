"""Vectors in Qdrant: on a server for corpora that exceed one machine, or embedded with the same client.

A passage is a point whose id is the digest of its content. An update sends new passages and removes old ones, and does
not repeat what an interrupted build has sent. A search ignores points of passages that are not in the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from lightning_softprompt.retrieval.search.fusion import Floats, Ranking, Rows
from lightning_softprompt.retrieval.search.vectors import Encode, Vectors, VectorStore
from lightning_softprompt.system.optional_packages import import_optional

BATCH_SIZE = 512  # points per call
PATIENCE = 60  # seconds


@final
class QdrantVectors(VectorStore):
    """Vectors in a collection of Qdrant.

    Args:
        folder: Folder of an embedded database; used without a url.
        url: Address of a server.
        collection: The collection's name.
        digests: Digests [n, 16] of the passages; required only for search.
    """

    def __init__(self, folder: Path, url: str | None, collection: str, digests: NDArray[np.uint8] | None) -> None:
        self.folder, self.url, self.collection, self.digests = folder, url, collection, digests

    @cached_property
    def client(self) -> Any:
        """The database.

        Raises:
            ValueError: If it cannot be reached, another process uses it, or qdrant-client is not installed.
        """
        qdrant = import_optional("qdrant_client")
        try:
            if self.url is None:
                return qdrant.QdrantClient(path=str(self.folder))
            client = qdrant.QdrantClient(url=self.url, timeout=PATIENCE)
            client.get_collections()
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder} is in use by another process, and embedded Qdrant serves one at a time ({error}). "
                "Wait for its end, or start a server and build with its url"
            ) from error
        except Exception as error:  # the client raises whatever its network layers do
            raise ValueError(
                f"no Qdrant answers at {self.url or self.folder} ({type(error).__name__}: {error}). Start a server, or "
                "check the address"
            ) from error
        return client

    def open(self) -> None:
        """Does nothing: a build removes points only after the manifest is replaced."""

    def write(self, digests: NDArray[np.uint8], encode: Encode, kept: Vectors | None) -> int:
        """Sends the vectors that the collection lacks."""
        models = import_optional("qdrant_client").models
        missing = self._missing(digests)
        for rows, vectors in encode(missing):
            self._collect(vectors.shape[1])
            names = [point_id(digests[row]) for row in rows]
            points = models.Batch(ids=names, vectors=vectors.tolist())
            self.client.upsert(self.collection, points, wait=True)
        return len(self._vector(digests[0]))

    def prune(self, digests: NDArray[np.uint8]) -> None:
        """Removes the points of other passages."""
        models = import_optional("qdrant_client").models
        named = {point_id(digest) for digest in digests}
        stale = [point for point in self._points() if point not in named]
        for start in range(0, len(stale), BATCH_SIZE):
            some = models.PointIdsList(points=stale[start : start + BATCH_SIZE])
            self.client.delete(self.collection, some, wait=True)

    def search(self, questions: Floats, k: int) -> list[Ranking]:
        """Returns the k nearest passages of each question."""
        return [self._search(question, min(k, len(self._rows))) for question in questions]

    def first_vector(self) -> Floats:
        """Returns the vector [H] of the first passage."""
        assert self.digests is not None, "search requires digests"
        return self._vector(self.digests[0])

    def delete(self) -> None:
        """Removes the collection."""
        self.client.delete_collection(self.collection)

    def close(self) -> None:
        """Closes the client, so that another process or object can open an embedded database."""
        if "client" in vars(self):
            self.client.close()
            del self.client

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        assert self.digests is not None, "search requires digests"
        return {point_id(digest): row for row, digest in enumerate(self.digests)}

    def _search(self, question: Floats, k: int) -> Ranking:
        limit = k
        while True:  # a running or interrupted build has points that this index does not contain
            points = self.client.query_points(self.collection, question.tolist(), limit=limit).points
            known = [point for point in points if str(point.id) in self._rows]
            named = [(self._rows[str(point.id)], point.score) for point in known[:k]]
            if len(named) == k or len(points) < limit:
                rows, scores = zip(*named, strict=True) if named else ((), ())
                return Ranking(np.array(rows, np.int64), np.array(scores, np.float32))
            limit *= 2

    def _collect(self, width: int) -> None:
        if not self.client.collection_exists(self.collection):
            models = import_optional("qdrant_client").models
            sizes = models.VectorParams(size=width, distance=models.Distance.COSINE)
            self.client.create_collection(self.collection, sizes)

    def _missing(self, digests: NDArray[np.uint8]) -> Rows:
        existing = set(self._points()) if self.client.collection_exists(self.collection) else set()
        return np.array([row for row, digest in enumerate(digests) if point_id(digest) not in existing], np.int64)

    def _points(self) -> Iterator[str]:
        offset = None
        while True:
            points, offset = self.client.scroll(
                self.collection, limit=BATCH_SIZE, offset=offset, with_payload=False, with_vectors=False
            )
            yield from (str(point.id) for point in points)
            if offset is None:
                return

    def _vector(self, digest: NDArray[np.uint8]) -> Floats:
        points = self.client.retrieve(self.collection, [point_id(digest)], with_vectors=True)
        return np.array(points[0].vector, np.float32)


def point_id(digest: NDArray[np.uint8]) -> str:
    """Returns the id of the point of a passage: its digest as a UUID."""
    return str(UUID(bytes=digest.tobytes()))
