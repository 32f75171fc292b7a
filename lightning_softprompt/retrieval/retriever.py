"""A retriever: an index and how it is searched, as a configuration names them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, final

from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.passages.documents import Hit
from lightning_softprompt.retrieval.reranker import Reranker, rerank
from lightning_softprompt.retrieval.search.fusion import Fusion, Ranking, WeightedScores

SearchMode = Literal["hybrid", "lexical", "dense"]
MODES = ("hybrid", "lexical", "dense")


@final
class Retriever:
    """Finds passages for questions. It opens its index when it first searches, in each process on its own.

    Args:
        index: Folder of an index; `softprompt index build` makes one.
        mode: `lexical` by words (BM25), `dense` by vectors, or `hybrid`, both fused.
        candidates: Passages of each ranking that are fused, and that the re-ranker reads.
        fusion: How the two rankings become one; weighted scores, half and half, unless given.
        reranker: What puts the candidates in order; none unless given.

    Raises:
        ValueError: If the way is not known, or there are no candidates.
    """

    def __init__(
        self,
        index: str,
        mode: SearchMode = "hybrid",
        candidates: int = 100,
        fusion: Fusion | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if candidates < 1:
            raise ValueError(f"candidates must be 1 or more, got {candidates}")
        self.folder, self.mode, self.candidates = index, mode, candidates
        self.fusion, self.reranker = fusion or WeightedScores(), reranker

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "index"}

    @cached_property
    def index(self) -> Index:
        """The index.

        Raises:
            BadIndexError: If there is none, or it is damaged, or of another format.
        """
        return Index(self.folder)

    @property
    def identity(self) -> tuple[object, ...]:
        """What decides what is found, as plain values."""
        reranker = self.reranker.identity if self.reranker else None
        return self.index.manifest.identity, self.mode, self.candidates, repr(self.fusion), reranker

    def search(self, questions: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """The k best passages for each question, best first; fewer where fewer fit.

        Raises:
            BadIndexError: If the index cannot be opened.
            ValueError: If it was built without what the way wants.
        """
        return [self.hits(ranking) for ranking in self.rank(questions, k)]

    def rank(self, questions: Sequence[str], k: int = 10) -> list[Ranking]:
        """The k best passages for each question, as rows of the index.

        Raises:
            BadIndexError: If the index cannot be opened.
            ValueError: If it was built without what the way wants, or k is not 1 or more.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        if self.reranker is None:
            return self._rank_candidates(questions, k)
        found = self._rank_candidates(questions, max(k, self.candidates))
        return rerank(self.reranker, questions, found, self.index.passages, k)

    def hits(self, ranking: Ranking) -> list[Hit]:
        """A ranking's passages."""
        pairs = zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)
        return [Hit(self.index.passages[row], score) for row, score in pairs]

    def _rank_candidates(self, questions: Sequence[str], k: int) -> list[Ranking]:
        if self.mode == "lexical":
            return self.index.lexical(questions, k)
        if self.mode == "dense":
            return self.index.dense(questions, k)
        wide = max(k, self.candidates)
        both = zip(self.index.lexical(questions, wide), self.index.dense(questions, wide), strict=True)
        return [self.fusion(lexical, dense, k) for lexical, dense in both]
