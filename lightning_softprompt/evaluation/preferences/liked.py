"""Metrics of single answers that are liked or not: whether liked answers have higher scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.answer_pairs import preferences_of
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.text_rows import Numbers, TextRows

COLUMNS = ("score", "is_liked")


@final
class LikedEvaluation(Evaluation):
    """Whether liked answers have higher scores than others, for data with one answer to each question.

    Scores are those of `PreferenceEvaluation`. Logs `accuracy`, the share of pairs of a liked and another answer, to
    any questions, of which the liked one has the higher score (the area under the ROC curve; equal scores count one
    half), and the mean scores `liked_score` and `disliked_score`. Scores of answers to different questions can be
    compared only roughly.
    """

    monitor = ("accuracy", "max")
    logged = ("accuracy", "liked_score", "disliked_score")

    def __init__(self) -> None:
        super().__init__()
        self.rows = TextRows(COLUMNS)

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the score of each answer."""
        return self._records(lm.answer_scores(batch), batch)

    def _records(self, scores: Tensor, batch: Batch) -> list[dict[str, Any]]:
        rows = zip(scores.tolist(), preferences_of(batch), strict=True)
        return [{"prediction": question.target, "scores": {"score": score}} for score, question in rows]

    def update(self, lm: PromptedLM, batch: Batch) -> Sequence[dict[str, Any]]:
        """Adds a batch to the metrics and returns its records."""
        if batch.grades is None:
            raise ValueError("answers that are neither liked nor disliked cannot be scored; use predict")
        scores = lm.answer_scores(batch)
        is_liked = (batch.grades > 0).to(scores.dtype)
        self.rows.update(batch.row_ids, torch.stack([scores, is_liked], dim=1).tolist(), [{}] * len(batch))
        records = self._records(scores, batch)
        targets = ["liked" if liked else "disliked" for liked in is_liked.tolist()]
        return [{**record, "target": target} for record, target in zip(records, targets, strict=True)]

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics; a metric of answers that do not occur is missing."""
        columns = self.rows.compute().columns
        is_liked = columns["is_liked"] > 0
        liked, others = columns["score"][is_liked], columns["score"][~is_liked]
        metrics = {"liked_score": liked.mean()} if len(liked) else {}
        if len(others):
            metrics["disliked_score"] = others.mean()
        if len(liked) and len(others):
            metrics["accuracy"] = share_above(liked, others)
        return {name: torch.tensor(float(value), device=self.rows.device) for name, value in metrics.items()}

    def reset(self) -> None:
        """Resets the metrics."""
        self.rows.reset()


def share_above(first: Numbers, second: Numbers) -> float:
    """Returns the share of pairs whose first value is greater than the second; equal values count one half.

    >>> share_above(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    0.625
    """
    ordered = np.sort(second)
    below, not_above = np.searchsorted(ordered, first, "left"), np.searchsorted(ordered, first, "right")
    return float((below + not_above).mean() / 2 / len(second))
