"""Cached search results of a set of questions, so that training does not search in each epoch."""

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
VERSION = 1  # of the contents of a file; part of the key


def search_cached(retriever: Retriever, questions: Sequence[str], k: int = 10) -> list[list[Hit]]:
    """Returns the k best passages for each question, from the cache if possible.

    Searches again if a question, the index, its settings or the settings of the retriever have changed.

    Raises:
        BadIndexError: If the index cannot be opened.
        ValueError: If the index lacks what the mode of the retriever requires.
    """
    return [retriever.hits(ranking) for ranking in rank_cached(retriever, questions, k)]


def rank_cached(retriever: Retriever, questions: Sequence[str], k: int) -> list[Ranking]:
    """Returns the k best passages for each question as rows of the index, from the cache if possible.

    Raises:
        BadIndexError: If the index cannot be opened.
        ValueError: If the index lacks what the mode of the retriever requires.
    """
    if not questions:
        return []
    path = cache_folder() / f"{_key(retriever, questions, k)}.npz"
    rankings = _read_valid(path, len(questions))
    if rankings is None:
        rankings = retriever.rank(questions, k)
        _write(path, rankings)
    return rankings


def _read_valid(path: Path, count: int) -> list[Ranking] | None:
    """Reads the rankings of `count` questions from a file; None if the file does not exist or is damaged."""
    try:
        rankings = _read(path)
        if len(rankings) == count:
            return rankings
        reason = f"it has {len(rankings)} rankings for {count} questions"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        reason = str(error)
    log.warning("%s is damaged and is replaced: %s", path, reason)
    return None


def cache_folder() -> Path:
    """Returns the folder of the cache."""
    return cache_dirs.cache_folder("found")


def _key(retriever: Retriever, questions: Sequence[str], k: int) -> str:
    digest = sha256(repr((VERSION, retriever.identity, k)).encode())
    for question in questions:
        digest.update(sha256(question.encode()).digest())
    return digest.hexdigest()[:32]


def _write(path: Path, rankings: Sequence[Ranking]) -> None:
    rows = np.concatenate([np.empty(0, np.int64), *(ranking.rows for ranking in rankings)])
    scores = np.concatenate([np.empty(0, np.float32), *(ranking.scores for ranking in rankings)])
    lengths = [len(ranking) for ranking in rankings]
    write_if_possible(path, lambda draft: np.savez(draft, rows=rows, scores=scores, lengths=lengths))


def _read(path: Path) -> list[Ranking]:
    with np.load(path) as arrays:
        cuts = np.cumsum(arrays["lengths"])[:-1].astype(np.int64)
        parts = zip(np.split(arrays["rows"], cuts), np.split(arrays["scores"], cuts), strict=True)
        return [Ranking(rows, scores) for rows, scores in parts]
