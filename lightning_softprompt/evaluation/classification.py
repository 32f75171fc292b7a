"""Classification metrics: accuracy, precision, recall, F1, Matthews correlation, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.case_ranking import ByConfidence
from lightning_softprompt.evaluation.metrics.extra import ExtraMetrics
from lightning_softprompt.evaluation.metrics.intervals import share_interval
from lightning_softprompt.system.printable import metric_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_CLASS = ("precision", "recall", "f1")
INTERVAL = ("accuracy_low", "accuracy_high")


@final
class ClassificationEvaluation(Evaluation):
    """Metrics of a classification task.

    Logs `accuracy`, `macro_f1` (over the classes that occur), `mcc`, `cross_entropy` over the classes, and for each
    class `precision/<name>`, `recall/<name>`, `f1/<name>`, and `predicted/<name>`, the fraction of rows that are
    predicted as this class. A test also logs the 95 % interval of the accuracy over rows (Wilson 1927), as
    `accuracy_low` and `accuracy_high`.

    Args:
        names: The classes in order.
        extra_metrics: Further metrics of torchmetrics. They are updated with class probabilities [B, C] and labels [B].
            A result has the class name of its metric in snake case; results in a mapping have their names in it.

    Raises:
        ValueError: If an extra metric does not fit the classes, is not a scalar, or has the name of another metric.
    """

    monitor = ("accuracy", "max")
    case_ranking = ByConfidence()

    def __init__(self, names: tuple[str, ...], extra_metrics: Sequence[Metric] = ()) -> None:
        super().__init__()
        self.names = tuple(names)
        self.metric_names = tuple(metric_name(name) for name in names)
        kinds = (*PER_CLASS, "predicted")
        self.by_class = tuple(f"{kind}/{name}" for kind in kinds for name in self.metric_names)
        standard_names = ("accuracy", "macro_f1", "mcc", "cross_entropy", *self.by_class)
        one_row_per_class = (torch.eye(len(names)).softmax(-1), torch.arange(len(names)))
        self.extra = ExtraMetrics(extra_metrics, one_row_per_class, {"loss", *standard_names, *INTERVAL})
        self.logged = (*standard_names, *self.extra.names)
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(len(names), average="micro"),
                "macro_f1": MulticlassF1Score(len(names), average="macro"),
                "mcc": MulticlassMatthewsCorrCoef(len(names)),
                "precision": MulticlassPrecision(len(names), average="none"),
                "f1": MulticlassF1Score(len(names), average="none"),
                "recall": MulticlassRecall(len(names), average="none"),
                "confusion": MulticlassConfusionMatrix(len(names)),  # [C, C], rows are true classes
            }
        )
        self.loss = MeanMetric()

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the most probable class and the probability of each class."""
        probabilities = lm.scores(batch).softmax(-1)
        best = probabilities.argmax(-1).tolist()
        return [
            {"prediction": self.names[number], "scores": dict(zip(self.names, row, strict=True))}
            for number, row in zip(best, probabilities.tolist(), strict=True)
        ]

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Adds a batch to the metrics and returns its records."""
        if batch.labels is None:
            raise ValueError("rows without labels cannot be scored; use predict")
        scores = lm.scores(batch)
        self.metrics.update(scores.argmax(-1), batch.labels)
        self.loss.update(cross_entropy(scores, batch.labels, reduction="none"))
        self.extra.update(scores.float().softmax(-1), batch.labels)
        targets = [self.names[i] for i in batch.labels.tolist()]
        records = self.predict(lm, batch)
        return [{**record, "target": target} for record, target in zip(records, targets, strict=True)]

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        counts = self.metrics["confusion"].compute()  # [C, C]
        results = {name: self.metrics[name].compute().float() for name in ("accuracy", "macro_f1", "mcc")}
        results["cross_entropy"] = self.loss.compute()
        if self.stage == "test" and counts.sum() > 0:
            low, high = share_interval(float(results["accuracy"]), int(counts.sum()))
            results |= dict(zip(INTERVAL, (torch.tensor(low), torch.tensor(high)), strict=True))
        for kind in PER_CLASS:
            values = self.metrics[kind].compute()
            results |= {f"{kind}/{name}": value for name, value in zip(self.metric_names, values, strict=True)}
        predicted = counts.sum(0) / counts.sum().clamp(min=1)
        results |= {f"predicted/{name}": value for name, value in zip(self.metric_names, predicted, strict=True)}
        if counts.sum() > 0:  # many metrics cannot be computed without rows
            results |= self.extra.compute()
        return results

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return self.extra.modes.get(name) or super().mode_of(name)

    def reset(self) -> None:
        """Resets the metrics."""
        self.metrics.reset()
        self.loss.reset()
        self.extra.reset()

    def figures(self) -> dict[str, Figure]:
        """Returns the confusion matrix, normalized over each true class."""
        from lightning_softprompt.evaluation.figures import confusion_figure

        return {"confusion": confusion_figure(self.metrics["confusion"].compute().cpu(), self.metric_names)}
