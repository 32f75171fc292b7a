"""Re-ranking: a slower and more accurate model orders the retrieved passages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

import numpy as np

from lightning_softprompt.retrieval.passages.documents import Passage
from lightning_softprompt.retrieval.passages.text_files import Passages
from lightning_softprompt.retrieval.search.fusion import Ranking, top_k

BATCH_SIZE = 32  # pairs


class Reranker(ABC):
    """Scores how well passages answer a question."""

    @property
    @abstractmethod
    def identity(self) -> tuple[object, ...]:
        """Everything that determines the scores, as plain values."""

    @abstractmethod
    def scores(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """Returns a score for each passage; higher is better."""


@final
class CrossEncoder(Reranker):
    """A classifier of pairs with one output, as trained on MS MARCO (Nogueira & Cho 2019, arXiv 1901.04085).

    Args:
        name: A folder with safetensors, or a hub id.
        max_tokens: Maximum tokens of a pair; longer passages are truncated.
        device: Device of the model (default: CUDA if available, else the CPU).
    """

    def __init__(self, name: str, max_tokens: int = 512, device: str | None = None) -> None:
        self.name, self.max_tokens, self.device = name, max_tokens, device

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "max_tokens": self.max_tokens, "device": self.device}

    @property
    def identity(self) -> tuple[object, ...]:
        """Name and maximum length."""
        return self.name, self.max_tokens

    def scores(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """Returns the logit of each pair.

        Raises:
            ValueError: If the model cannot be loaded, or does not have one output.
        """
        import torch

        tokenizer, model = self._model
        scores: list[float] = []
        for start in range(0, len(passages), BATCH_SIZE):
            texts = [passage.searched for passage in passages[start : start + BATCH_SIZE]]
            pairs = tokenizer(
                [question] * len(texts), texts, padding=True, truncation="only_second",
                max_length=min(self.max_tokens, tokenizer.model_max_length), return_tensors="pt",
            ).to(model.device)  # fmt: skip
            with torch.inference_mode():
                scores += model(**pairs).logits[:, 0].float().tolist()
        return scores

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
            load = AutoModelForSequenceClassification.from_pretrained
            model = load(self.name, trust_remote_code=False, use_safetensors=True).to(device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"cross-encoder {self.name!r} cannot be loaded: {reason} Set name to a folder with safetensors "
                "or a hub id"
            ) from error
        if model.config.num_labels != 1:
            raise ValueError(f"{self.name!r} has {model.config.num_labels} classes; a cross-encoder requires one")
        return tokenizer, model


def rerank(
    reranker: Reranker, questions: Sequence[str], rankings: Sequence[Ranking], passages: Passages, k: int
) -> list[Ranking]:
    """Returns the k best passages of each ranking by the scores of the re-ranker."""
    reranked = []
    for question, ranking in zip(questions, rankings, strict=True):
        scores = reranker.scores(question, [passages[row] for row in ranking.rows.tolist()])
        reranked.append(top_k(ranking.rows, np.array(scores, np.float64), k))
    return reranked
