"""Metrics of multiple-choice questions with retrieved passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.generation import require_examples
from lightning_softprompt.evaluation.metrics.retrieval import (
    FOUND,
    SEARCHED,
    names_to_report,
    retrieval_names,
    search_scores,
)
from lightning_softprompt.evaluation.metrics.text_rows import TextRows
from lightning_softprompt.evaluation.metrics.text_scorer import compute_means
from lightning_softprompt.evaluation.qa import describe_answers, describe_question

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@final
class ChoiceEvaluation(Evaluation):
    """Metrics of multiple-choice questions with retrieved passages.

    Logs the metrics of `ClassificationEvaluation` for the choices, and the retrieval metrics of `QaEvaluation`:
    `hit@k`, `recall@k`, `precision@k`, `ndcg@k` and `mrr`, in a test also their intervals `_low` and `_high`.

    Args:
        names: The choices in order.
        extra_metrics: As in `ClassificationEvaluation`.
    """

    monitor = ClassificationEvaluation.monitor
    of_retrieval = retrieval_names()

    def __init__(self, names: tuple[str, ...], extra_metrics: Sequence[Metric] = ()) -> None:
        super().__init__()
        self.classification = ClassificationEvaluation(names, extra_metrics)
        self.by_class = self.classification.by_class
        self.retrieval = TextRows((*retrieval_names(), FOUND, SEARCHED))
        self.logged = (*(self.classification.logged or ()), *retrieval_names())

    def begin(self, stage: str, epoch: int) -> None:
        """Starts an evaluation; only a test computes intervals."""
        self.classification.begin(stage, epoch)
        super().begin(stage, epoch)

    def reset(self) -> None:
        """Resets the metrics."""
        self.classification.reset()
        self.retrieval.reset()

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the most probable choice and the probability of each, with the question and the passages."""
        rows = zip(self.classification.predict(lm, batch), require_examples(batch), strict=True)
        return [{**record, "details": describe_question(example)} for record, example in rows]

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Adds a batch to the metrics and returns its records."""
        examples = require_examples(batch)
        scores = [search_scores(example.found, example.gold, example.searched) for example in examples]
        table = [[row[name] for name in self.retrieval.columns] for row in scores]
        self.retrieval.update(batch.row_ids, table, [{}] * len(examples))
        records = self.classification.update(lm, batch)
        for record, example in zip(records, examples, strict=True):
            record["details"] = {**describe_question(example), **describe_answers(example, example.references)}
        return records

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        rows = self.retrieval.compute()
        names = names_to_report(rows.columns[FOUND], rows.columns[SEARCHED])
        means = compute_means(rows, names, with_intervals=self.stage == "test")
        tensors = {name: torch.tensor(mean, device=self.retrieval.device) for name, mean in means.items()}
        return {**self.classification.compute(), **tensors}

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return self.classification.mode_of(name)

    def figures(self) -> dict[str, Figure]:
        """Returns the confusion matrix, normalized over each true choice."""
        return self.classification.figures()
