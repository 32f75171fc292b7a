"""A log of the vectors of passages: a build that is interrupted resumes with the vectors that it has encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from lightning_softprompt.retrieval.index import MIN_SIMILARITY
from lightning_softprompt.retrieval.passages.documents import DIGEST_BYTES
from lightning_softprompt.retrieval.passages.text_files import Passages
from lightning_softprompt.retrieval.search.fusion import Floats, Rows
from lightning_softprompt.retrieval.search.vectors import Vectors

if TYPE_CHECKING:
    from lightning_softprompt.retrieval.search.encoder import Encoder

NAME = ".encoded-"
WINDOW = 256  # passages that are sorted by length before they are encoded
PART = 2**14  # vectors per read
Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]  # items, description, number of items


@final
class VectorLog:
    """A file of records with the digest of a passage and its vector, in the order of encoding.

    Ignores an incomplete last record, as a killed process leaves it, and records whose vector does not have length 1.

    Args:
        folder: Folder of the index.
        encoder: Name of the encoder of the vectors.
    """

    def __init__(self, folder: Path, encoder: str) -> None:
        self.folder, self.name = folder, f"{NAME}{blake2b(encoder.encode(), digest_size=8).hexdigest()}"

    def read(self) -> Vectors | None:
        """Returns the vectors in the file; None if there are none."""
        file = next(self.folder.glob(f"{self.name}-*"), None)
        if file is None:
            return None
        width = int(file.name.rpartition("-")[2])
        record = _record_type(width)
        count = file.stat().st_size // record.itemsize
        if count == 0:
            return None
        records: Any = np.memmap(file, record, "r", shape=(count,))
        rows: dict[bytes, int] = {}
        for start in range(0, count, PART):
            rows.update(_valid_rows(records, start))
        return Vectors(rows, records["vector"])

    def append(self, digests: NDArray[np.uint8], vectors: Floats) -> None:
        """Appends vectors [m, H] of passages [m, 16] after the last complete record."""
        records = np.empty(len(digests), _record_type(vectors.shape[1]))
        records["digest"], records["vector"] = digests, vectors
        with (self.folder / f"{self.name}-{vectors.shape[1]}").open("ab") as file:
            file.truncate(file.tell() - file.tell() % records.itemsize)
            file.write(records.tobytes())

    def delete(self) -> None:
        """Deletes the file."""
        for file in self.folder.glob(f"{self.name}-*"):
            file.unlink(missing_ok=True)


def _record_type(width: int) -> np.dtype[Any]:
    return np.dtype([("digest", np.uint8, DIGEST_BYTES), ("vector", np.float32, width)])


def _valid_rows(records: Any, start: int) -> Iterator[tuple[bytes, int]]:
    """Yields digest and row of the vectors of length 1 in one part."""
    part = records[start : start + PART]
    squared_lengths = np.square(part["vector"]).sum(1)
    rows = np.flatnonzero(np.abs(squared_lengths - 1) < 1 - MIN_SIMILARITY)
    return ((part["digest"][row].tobytes(), start + row) for row in rows.tolist())


def encode_passages(
    folder: Path, passages: Passages, name: str, track: Track, rows: Rows
) -> Iterator[tuple[Rows, Floats]]:
    """Yields the vectors of passages: first the logged ones of an interrupted build, then new ones, which are logged.

    Args:
        folder: Folder of the index.
        passages: The passages of the index.
        name: Name of the encoder.
        track: Shows progress.
        rows: Rows of the passages to encode.
    """
    if not len(rows):
        return
    from lightning_softprompt.retrieval.search.encoder import load_encoder

    encoder, vector_log = load_encoder(name), VectorLog(folder, name)
    logged = vector_log.read()
    log_rows = logged.find(passages.digests[rows]) if logged else np.full(len(rows), -1)
    if logged and not _is_same_encoder(encoder, passages, rows, log_rows, logged):
        vector_log.delete()
        log_rows[:] = -1
    reused = np.flatnonzero(log_rows >= 0)
    for start in range(0, len(reused), PART):
        assert logged, "it contains the reused rows"
        part = reused[start : start + PART]
        yield rows[part], logged.vectors[log_rows[part]]
    new = rows[log_rows < 0]
    windows = [new[start : start + WINDOW] for start in range(0, len(new), WINDOW)]
    for window in track(windows, f"encoding {len(new)} passages, {WINDOW} per step", len(windows)):
        vectors = encoder.passages([passages[row].searched for row in window.tolist()])
        vector_log.append(passages.digests[window], vectors)
        yield window, vectors


def _is_same_encoder(encoder: Encoder, passages: Passages, rows: Rows, log_rows: Rows, logged: Vectors) -> bool:
    """Whether an encoder is the one of the logged vectors, by the first passage that has one."""
    reused = np.flatnonzero(log_rows >= 0)
    if not len(reused):
        return False
    first = reused[0]
    new = encoder.passages([passages[int(rows[first])].searched])[0]
    stored = logged.vectors[log_rows[first]]
    return new.shape == stored.shape and float(new @ stored) >= MIN_SIMILARITY


def delete_logs(folder: Path) -> None:
    """Deletes the logs of an index, which a complete index does not need."""
    for file in folder.glob(f"{NAME}*"):
        file.unlink(missing_ok=True)
