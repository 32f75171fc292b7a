"""Lexical search: BM25 (Robertson et al. 1994; the variant of Lucene) by bm25s, which computes scores when it indexes.

The score of a passage p for a query q::

    score(q, p) = sum over words w of q: idf(w) * tf / (tf + k1 * (1 - b + b * |p| / mean |p|)),
    idf(w) = ln(1 + (N - df + 1/2) / (df + 1/2))
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lightning_softprompt.retrieval.passages.documents import CorpusError
from lightning_softprompt.retrieval.passages.words import words
from lightning_softprompt.retrieval.search.fusion import Ranking, top_k
from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.system.optional_packages import import_optional

WORDS, ENDS = "words.npy", "words_ends.npy"


def write_lexical(folder: Path, tokens: Sequence[Sequence[str]], settings: IndexSettings) -> None:
    """Writes an index of passages, given as the words of each passage.

    Raises:
        CorpusError: If no passage has a word.
        ValueError: If bm25s is not installed.
    """
    vocabulary = {word: number for number, word in enumerate(sorted(set(chain.from_iterable(tokens))))}
    if not vocabulary:
        raise CorpusError("no passage has a letter or digit, so there is nothing to search for; check the text column")
    ids = [[vocabulary[word] for word in passage] for passage in tokens]
    scorer = _bm25s().BM25(k1=settings.k1, b=settings.b, method="lucene")
    scorer.index((ids, vocabulary), show_progress=False)
    scorer.save(str(folder))
    np.save(folder / WORDS, np.fromiter(chain.from_iterable(ids), np.int32))
    np.save(folder / ENDS, np.cumsum([0, *map(len, ids)], dtype=np.int64))


def _bm25s() -> Any:
    package = import_optional("bm25s")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s enables its debug messages
    return package


@final
class Lexical:
    """BM25 over what `write_lexical` wrote, mapped into memory.

    Args:
        folder: Folder of the files.
        language: Language of the stemmer.

    Raises:
        ValueError: If bm25s is not installed.
    """

    def __init__(self, folder: Path, language: str) -> None:
        self.scorer: Any = _bm25s().BM25.load(str(folder), mmap=True)
        self.language = language
        self._words: NDArray[np.int32] = np.load(folder / WORDS, mmap_mode="r")
        self._ends: NDArray[np.int64] = np.load(folder / ENDS, mmap_mode="r")

    @cached_property
    def _vocabulary(self) -> list[str]:
        return list(self.scorer.vocab_dict)  # in the order of the word ids

    def words(self, row: int) -> list[str]:
        """Returns the indexed words of a passage."""
        ids = self._words[self._ends[row] : self._ends[row + 1]]
        return [self._vocabulary[id] for id in ids.tolist()]

    def search(self, question: str, k: int) -> Ranking:
        """Returns the k best passages for a question, among passages that share a word with it."""
        known = [word for word in words(question, self.language) if word in self.scorer.vocab_dict]
        if not known:
            return Ranking(np.empty(0, np.int64), np.empty(0, np.float32))
        scores = self.scorer.get_scores(known)  # [n]
        rows = np.flatnonzero(scores > 0)
        return top_k(rows, scores[rows], k)
