"""Vectors in Qdrant: served for corpora that outgrow one machine, or embedded under the same client to try it out.

A passage is a point whose id is the digest of its content, so an update sends new passages and removes old ones, and
what a killed build has sent is not sent again. Points that an index does not name are not found through it.
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

BATCH_SIZE = 512  # points of a call
PATIENCE = 60  # seconds


@final
class QdrantVectors(VectorStore):
    """Vectors in a collection of Qdrant.

    Args:
        folder: Where an embedded database stands; used where there is no url.
        url: Address of a server.
        collection: The collection's name.
        digests: [n, 16], of the passages that are searched; needed for searching only.
    """

    def __init__(self, folder: Path, url: str | None, collection: str, digests: NDArray[np.uint8] | None) -> None:
        self.folder, self.url, self.collection, self.digests = folder, url, collection, digests

    @cached_property
    def client(self) -> Any:
        """The database.

        Raises:
            ValueError: If it cannot be reached, or another process has it, or qdrant-client is not installed.
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
        """Does nothing: no build takes away points that an index names before it is another."""

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
        """The k nearest of each question."""
        return [self._search(question, min(k, len(self._rows))) for question in questions]

    def first_vector(self) -> Floats:
        """[H] of the first passage."""
        assert self.digests is not None, "what is searched has digests"
        return self._vector(self.digests[0])

    def delete(self) -> None:
        """Removes the collection."""
        self.client.delete_collection(self.collection)

    def close(self) -> None:
        """Lets another process, or another object of this one, have an embedded database."""
        if "client" in vars(self):
            self.client.close()
            del self.client

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        assert self.digests is not None, "what is searched has digests"
        return {point_id(digest): row for row, digest in enumerate(self.digests)}

    def _search(self, question: Floats, k: int) -> Ranking:
        asked = k
        while True:  # a build that is under way, or was killed, has points that this index does not name
            points = self.client.query_points(self.collection, question.tolist(), limit=asked).points
            named = [(self._rows[str(p.id)], p.score) for p in points if str(p.id) in self._rows][:k]
            if len(named) == k or len(points) < asked:
                rows, scores = zip(*named, strict=True) if named else ((), ())
                return Ranking(np.array(rows, np.int64), np.array(scores, np.float32))
            asked *= 2

    def _collect(self, width: int) -> None:
        if not self.client.collection_exists(self.collection):
            models = import_optional("qdrant_client").models
            sizes = models.VectorParams(size=width, distance=models.Distance.COSINE)
            self.client.create_collection(self.collection, sizes)

    def _missing(self, digests: NDArray[np.uint8]) -> Rows:
        there = set(self._points()) if self.client.collection_exists(self.collection) else set()
        return np.array([row for row, digest in enumerate(digests) if point_id(digest) not in there], np.int64)

    def _points(self) -> Iterator[str]:
        place = None
        while True:
            points, place = self.client.scroll(
                self.collection, limit=BATCH_SIZE, offset=place, with_payload=False, with_vectors=False
            )
            yield from (str(point.id) for point in points)
            if place is None:
                return

    def _vector(self, digest: NDArray[np.uint8]) -> Floats:
        found = self.client.retrieve(self.collection, [point_id(digest)], with_vectors=True)
        return np.array(found[0].vector, np.float32)


def point_id(digest: NDArray[np.uint8]) -> str:
    """The name of a passage's point: its digest in the form that Qdrant takes."""
    return str(UUID(bytes=digest.tobytes()))
