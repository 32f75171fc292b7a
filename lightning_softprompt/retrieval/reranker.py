"""Re-ranking: a slower and better judge puts what was found in order."""

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
    """Says how well passages answer a question."""

    @property
    @abstractmethod
    def identity(self) -> tuple[object, ...]:
        """What decides its scores, as plain values."""

    @abstractmethod
    def scores(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """How well each passage answers the question, the more the better."""


@final
class CrossEncoder(Reranker):
    """A classifier of pairs with one class, such as those trained on MS MARCO (Nogueira & Cho 2019, arXiv 1901.04085).

    Args:
        name: A folder with safetensors, or a hub id.
        max_tokens: Tokens of a pair; the passage gives way.
        device: Where it runs; the first CUDA device if there is one, unless given.
    """

    def __init__(self, name: str, max_tokens: int = 512, device: str | None = None) -> None:
        self.name, self.max_tokens, self.device = name, max_tokens, device

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "max_tokens": self.max_tokens, "device": self.device}

    @property
    def identity(self) -> tuple[object, ...]:
        """Name and length."""
        return self.name, self.max_tokens

    def scores(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """The logit of the one class for each pair.

        Raises:
            ValueError: If the model cannot be loaded, or has another number of classes.
        """
        import torch

        tokenizer, model = self._load
        found: list[float] = []
        for start in range(0, len(passages), BATCH_SIZE):
            texts = [passage.searched for passage in passages[start : start + BATCH_SIZE]]
            pairs = tokenizer(
                [question] * len(texts), texts, padding=True, truncation="only_second",
                max_length=min(self.max_tokens, tokenizer.model_max_length), return_tensors="pt",
            ).to(model.device)  # fmt: skip
            with torch.inference_mode():
                found += model(**pairs).logits[:, 0].float().tolist()
        return found

    @cached_property
    def _load(self) -> tuple[Any, Any]:
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
                f"cross-encoder {self.name!r} cannot be loaded: {reason} Name a folder with safetensors or a hub id"
            ) from error
        if model.config.num_labels != 1:
            raise ValueError(f"{self.name!r} has {model.config.num_labels} classes; a cross-encoder has one, its score")
        return tokenizer, model


def rerank(
    reranker: Reranker, questions: Sequence[str], found: Sequence[Ranking], passages: Passages, k: int
) -> list[Ranking]:
    """The k best of what was found for each question, as the re-ranker judges."""
    judged = []
    for question, ranking in zip(questions, found, strict=True):
        scores = reranker.scores(question, [passages[row] for row in ranking.rows.tolist()])
        judged.append(top_k(ranking.rows, np.array(scores, np.float64), k))
    return judged
