"""What was found for a set of questions, kept on disk, so that training does not search in its loop."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from lightning_softprompt.retrieval.passages.documents import Hit
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.fusion import Ranking
from lightning_softprompt.system import cache_dirs
from lightning_softprompt.system.atomic_files import write_if_possible

log = logging.getLogger(__name__)
VERSION = 1  # of what stands in a file; another is another key


def search_cached(retriever: Retriever, questions: Sequence[str], k: int = 10) -> list[list[Hit]]:
    """The k best passages for each question: those kept from an earlier search, else those found now, which are kept.

    They are searched again where a question, the index, its settings or the way of searching is another.

    Raises:
        BadIndexError: If the index cannot be opened.
        ValueError: If it was built without what the retriever's way wants.
    """
    return [retriever.hits(ranking) for ranking in rank_cached(retriever, questions, k)]


def rank_cached(retriever: Retriever, questions: Sequence[str], k: int) -> list[Ranking]:
    """The same as rows of the index.

    Raises:
        BadIndexError: If the index cannot be opened.
        ValueError: If it was built without what the retriever's way wants.
    """
    if not questions:
        return []
    path = cache_folder() / f"{_key(retriever, questions, k)}.npz"
    if (kept := _kept(path, len(questions))) is not None:
        return kept
    found = retriever.rank(questions, k)
    _write(path, found)
    return found


def _kept(path: Path, count: int) -> list[Ranking] | None:
    """The rankings of so many questions in a file; None where there is none that can be read."""
    try:
        found = _read(path)
        if len(found) == count:
            return found
        reason = f"it has {len(found)} rankings of {count}"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        reason = str(error)
    log.warning("%s is damaged and is made again: %s", path, reason)
    return None


def cache_folder() -> Path:
    """Where it is kept."""
    return cache_dirs.cache_folder("found")


def _key(retriever: Retriever, questions: Sequence[str], k: int) -> str:
    digest = sha256(repr((VERSION, retriever.identity, k)).encode())
    for question in questions:
        digest.update(sha256(question.encode()).digest())
    return digest.hexdigest()[:32]


def _write(path: Path, found: Sequence[Ranking]) -> None:
    rows = np.concatenate([np.empty(0, np.int64), *(ranking.rows for ranking in found)])
    scores = np.concatenate([np.empty(0, np.float32), *(ranking.scores for ranking in found)])
    lengths = [len(ranking) for ranking in found]
    write_if_possible(path, lambda draft: np.savez(draft, rows=rows, scores=scores, lengths=lengths))


def _read(path: Path) -> list[Ranking]:
    with np.load(path) as kept:
        cuts = np.cumsum(kept["lengths"])[:-1].astype(np.int64)
        parts = zip(np.split(kept["rows"], cuts), np.split(kept["scores"], cuts), strict=True)
        return [Ranking(rows, scores) for rows, scores in parts]
