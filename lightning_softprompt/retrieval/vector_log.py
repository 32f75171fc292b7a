"""Vectors of passages, each kept as it is made: a build that is killed goes on with those that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from lightning_softprompt.retrieval.index import SAME
from lightning_softprompt.retrieval.passages.documents import DIGEST_BYTES
from lightning_softprompt.retrieval.passages.text_files import Passages
from lightning_softprompt.retrieval.search.fusion import Floats, Rows
from lightning_softprompt.retrieval.search.vectors import Vectors

if TYPE_CHECKING:
    from lightning_softprompt.retrieval.search.encoder import Encoder

NAME = ".encoded-"
WINDOW = 256  # passages that are sorted by length to be encoded
PART = 2**14  # vectors that are read at once
Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]  # items, what is done with them, how many they are


@final
class VectorLog:
    """A file of vectors, each behind the digest of its passage, in the order in which they were made.

    What a killed process left of a record that it was writing is passed over, and so is what is no vector of length 1.

    Args:
        folder: Of the index.
        encoder: Whose vectors they are.
    """

    def __init__(self, folder: Path, encoder: str) -> None:
        self.folder, self.name = folder, f"{NAME}{blake2b(encoder.encode(), digest_size=8).hexdigest()}"

    def found(self) -> Vectors | None:
        """What is there."""
        file = next(self.folder.glob(f"{self.name}-*"), None)
        record = _record(int(file.name.rpartition("-")[2])) if file else np.dtype(np.uint8)
        whole = file.stat().st_size // record.itemsize if file else 0
        if not file or not whole:
            return None
        records: Any = np.memmap(file, record, "r", shape=(whole,))
        return Vectors({d: r for start in range(0, whole, PART) for d, r in _sound(records, start)}, records["vector"])

    def add(self, digests: NDArray[np.uint8], vectors: Floats) -> None:
        """Keeps vectors [m, H] of passages [m, 16], behind the whole records that are there."""
        records = np.empty(len(digests), _record(vectors.shape[1]))
        records["digest"], records["vector"] = digests, vectors
        with (self.folder / f"{self.name}-{vectors.shape[1]}").open("ab") as file:
            file.truncate(file.tell() - file.tell() % records.itemsize)
            file.write(records.tobytes())

    def delete(self) -> None:
        """Takes it away."""
        for file in self.folder.glob(f"{self.name}-*"):
            file.unlink(missing_ok=True)


def _record(width: int) -> np.dtype[Any]:
    return np.dtype([("digest", np.uint8, DIGEST_BYTES), ("vector", np.float32, width)])


def _sound(records: Any, start: int) -> Iterator[tuple[bytes, int]]:
    """Digest and row of the vectors in one part that are of length 1."""
    part = records[start : start + PART]
    rows = np.flatnonzero(np.abs(np.square(part["vector"]).sum(1) - 1) < 1 - SAME)
    return ((part["digest"][row].tobytes(), start + row) for row in rows.tolist())


def encode_passages(
    folder: Path, passages: Passages, name: str, track: Track, rows: Rows
) -> Iterator[tuple[Rows, Floats]]:
    """The vectors of some passages: those that a killed build made, then the others, made and kept here.

    Args:
        folder: Of the index.
        passages: All of them.
        name: The encoder.
        track: Shows progress.
        rows: Which passages.
    """
    if not len(rows):
        return
    from lightning_softprompt.retrieval.search.encoder import load_encoder

    found, kept = load_encoder(name), VectorLog(folder, name)
    before = kept.found()
    places = before.find(passages.digests[rows]) if before else np.full(len(rows), -1)
    if before and not _is_same_encoder(found, passages, rows, places, before):
        kept.delete()
        places[:] = -1
    there = np.flatnonzero(places >= 0)
    for part in (there[start : start + PART] for start in range(0, len(there), PART)):
        assert before, "places are in it"
        yield rows[part], before.vectors[places[part]]
    left = rows[places < 0]
    windows = [left[start : start + WINDOW] for start in range(0, len(left), WINDOW)]
    for some in track(windows, f"encoding {len(left)} passages, {WINDOW} a step", len(windows)):
        made = found.passages([passages[row].searched for row in some.tolist()])
        kept.add(passages.digests[some], made)
        yield some, made


def _is_same_encoder(encoder: Encoder, passages: Passages, rows: Rows, places: Rows, before: Vectors) -> bool:
    """Whether an encoder is the one whose vectors were kept, by the first that is wanted."""
    wanted = np.flatnonzero(places >= 0)
    if not len(wanted):
        return False
    here, there = encoder.passages([passages[int(rows[wanted[0]])].searched])[0], before.vectors[places[wanted[0]]]
    return here.shape == there.shape and float(here @ there) >= SAME


def delete_logs(folder: Path) -> None:
    """Takes away what an index that is whole has no more use for."""
    for file in folder.glob(f"{NAME}*"):
        file.unlink(missing_ok=True)
