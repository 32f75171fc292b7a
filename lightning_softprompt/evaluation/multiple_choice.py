"""Metrics of questions that are answered by one of some choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.generation import examples_of
from lightning_softprompt.evaluation.metrics.retrieval import (
    FOUND,
    SEARCHED,
    names_to_report,
    retrieval_names,
    search_measures,
)
from lightning_softprompt.evaluation.metrics.text_rows import TextRows
from lightning_softprompt.evaluation.metrics.text_scorer import means_of
from lightning_softprompt.evaluation.qa import asked_of, right_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@final
class ChoiceEvaluation(Evaluation):
    """Metrics of questions that are answered by one of some choices.

    Logs all that `ClassificationEvaluation` does of the choices, and of what was found for the questions what
    `QaEvaluation` does: `hit@k`, `recall@k`, `precision@k`, `ndcg@k` and `mrr`, in a test with `_low` and `_high`.

    Args:
        names: The choices in order.
    """

    monitor = ClassificationEvaluation.monitor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.chosen = ClassificationEvaluation(names)
        self.searches = TextRows((*retrieval_names(), FOUND, SEARCHED))
        self.logged = (*(self.chosen.logged or ()), *retrieval_names())

    def reset(self) -> None:
        """Forgets the pass."""
        self.chosen.reset()
        self.searches.reset()

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """The likeliest choice and the probability of each, with the question and the passages that were shown."""
        rows = zip(self.chosen.predict(lm, batch), examples_of(batch), strict=True)
        return [{**said, "details": asked_of(example)} for said, example in rows]

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Counts the batch."""
        examples = examples_of(batch)
        measured = [search_measures(example.found, example.gold, example.searched) for example in examples]
        table = [[of[name] for name in self.searches.columns] for of in measured]
        self.searches.update(batch.row_ids, table, [{}] * len(examples))
        rows = zip(self.chosen.update(lm, batch), examples, strict=True)
        return [{**said, "details": {**asked_of(of), **right_of(of, of.references)}} for said, of in rows]

    def compute(self) -> dict[str, Tensor]:
        """The metrics of the pass."""
        rows = self.searches.compute()
        means = means_of(rows, names_to_report(rows.columns[FOUND], rows.columns[SEARCHED]), self.stage == "test")
        of_search = {name: torch.tensor(mean, device=self.searches.device) for name, mean in means.items()}
        return {**self.chosen.compute(), **of_search}

    def figures(self) -> dict[str, Figure]:
        """The confusion matrix, in shares of each true choice."""
        return self.chosen.figures()
