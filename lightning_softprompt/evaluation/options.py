"""Metrics of multiple choice with options that differ from row to row."""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, SumMetric

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch, options_of
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.intervals import share_interval

MEANS = ("accuracy", "cross_entropy", "chance", "num_options")


@final
class OptionEvaluation(Evaluation):
    """Metrics of multiple choice with options that differ from row to row.

    Logs `accuracy`, `cross_entropy` over the options of a row, `chance`, the accuracy of a random choice, and
    `num_options`, the mean number of options. A test also logs the 95 % interval of the accuracy over rows (Wilson
    1927), as `accuracy_low` and `accuracy_high`.
    """

    monitor = ("accuracy", "max")
    logged = MEANS

    def __init__(self) -> None:
        super().__init__()
        self.means = torch.nn.ModuleDict({name: MeanMetric() for name in MEANS})
        self.num_rows = SumMetric()

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the most probable option and the probability of each."""
        return self._records(lm.scores(batch), batch)

    def _records(self, scores: Tensor, batch: Batch) -> list[dict[str, Any]]:
        records = []
        rows = zip(scores.softmax(-1).tolist(), scores.argmax(-1).tolist(), options_of(batch), strict=True)
        for probabilities, best, options in rows:
            by_option = dict(zip(options, probabilities, strict=False))  # rows with fewer options have padding
            records.append({"prediction": options[best], "scores": by_option})
        return records

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Adds a batch to the metrics and returns its records."""
        if batch.labels is None:
            raise ValueError("rows without answers cannot be scored; use predict")
        scores, options = lm.scores(batch), options_of(batch)
        counts = torch.tensor([float(len(of_row)) for of_row in options], device=scores.device)
        values = {
            "accuracy": (scores.argmax(-1) == batch.labels).float(),
            "cross_entropy": cross_entropy(scores, batch.labels, reduction="none"),
            "chance": 1 / counts,
            "num_options": counts,
        }
        for name, of_rows in values.items():
            cast(MeanMetric, self.means[name]).update(of_rows)
        self.num_rows.update(len(batch))
        targets = [of_row[label] for of_row, label in zip(options, batch.labels.tolist(), strict=True)]
        records = self._records(scores, batch)
        return [{**record, "target": target} for record, target in zip(records, targets, strict=True)]

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        results: dict[str, Tensor] = {name: cast(MeanMetric, self.means[name]).compute() for name in MEANS}
        num_rows = int(self.num_rows.compute())
        if self.stage == "test" and num_rows:
            low, high = share_interval(float(results["accuracy"]), num_rows)
            results |= {"accuracy_low": torch.tensor(low), "accuracy_high": torch.tensor(high)}
        return results

    def reset(self) -> None:
        """Resets the metrics."""
        for metric in (*self.means.values(), self.num_rows):
            cast(Metric, metric).reset()
