"""A retriever: an index and how to search it, as set in a config."""

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
    """Retrieves passages for questions. Each process opens the index at its first search.

    Args:
        index: Folder of an index, as built by `softprompt index build`.
        mode: `lexical` compares words (BM25), `dense` compares vectors, and `hybrid` fuses both rankings.
        candidates: Number of passages of each ranking to fuse, and to pass to the re-ranker.
        fusion: How to fuse the two rankings (default: scores with equal weights).
        reranker: Re-ranks the candidates (default: no re-ranking).

    Raises:
        ValueError: If the mode is unknown, or candidates is less than 1.
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
            raise ValueError(f"candidates must be at least 1, got {candidates}")
        self.folder, self.mode, self.candidates = index, mode, candidates
        self.fusion, self.reranker = fusion or WeightedScores(), reranker

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "index"}

    @cached_property
    def index(self) -> Index:
        """The index.

        Raises:
            BadIndexError: If there is no index, or it is damaged or has another format.
        """
        return Index(self.folder)

    @property
    def identity(self) -> tuple[object, ...]:
        """Everything that determines the results, as plain values."""
        reranker = self.reranker.identity if self.reranker else None
        return self.index.manifest.identity, self.mode, self.candidates, repr(self.fusion), reranker

    def search(self, questions: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """Returns the k best passages for each question, the best first; fewer if fewer match.

        Raises:
            BadIndexError: If the index cannot be opened.
            ValueError: If the index lacks what the mode requires.
        """
        return [self.hits(ranking) for ranking in self.rank(questions, k)]

    def rank(self, questions: Sequence[str], k: int = 10) -> list[Ranking]:
        """Returns the k best passages for each question, as rows of the index.

        Raises:
            BadIndexError: If the index cannot be opened.
            ValueError: If the index lacks what the mode requires, or k is less than 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if self.reranker is None:
            return self._rank_candidates(questions, k)
        rankings = self._rank_candidates(questions, max(k, self.candidates))
        return rerank(self.reranker, questions, rankings, self.index.passages, k)

    def hits(self, ranking: Ranking) -> list[Hit]:
        """Returns the passages of a ranking with their scores."""
        pairs = zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)
        return [Hit(self.index.passages[row], score) for row, score in pairs]

    def _rank_candidates(self, questions: Sequence[str], k: int) -> list[Ranking]:
        if self.mode == "lexical":
            return self.index.lexical(questions, k)
        if self.mode == "dense":
            return self.index.dense(questions, k)
        count = max(k, self.candidates)
        lexical_rankings = self.index.lexical(questions, count)
        dense_rankings = self.index.dense(questions, count)
        pairs = zip(lexical_rankings, dense_rankings, strict=True)
        return [self.fusion(lexical, dense, k) for lexical, dense in pairs]
