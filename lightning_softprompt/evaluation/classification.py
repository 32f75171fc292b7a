"""Accuracy, precision, recall, F1, Matthews correlation and the confusion matrix of a task with classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
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
from lightning_softprompt.system.printable import metric_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_EACH_CLASS = ("precision", "recall", "f1")


@final
class ClassificationEvaluation(Evaluation):
    """Metrics of a task with classes.

    Logs `accuracy`, `macro_f1` (over the classes that occur), `mcc`, `cross_entropy` over the classes, and for each
    class `precision/<name>`, `recall/<name>`, `f1/<name>`, and `predicted/<name>`, the share of rows that it was said
    of.

    Args:
        names: The classes in order.
    """

    monitor = ("accuracy", "max")

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.metric_names = tuple(metric_name(name) for name in names)
        each = (f"{what}/{name}" for what in (*OF_EACH_CLASS, "predicted") for name in self.metric_names)
        self.logged = ("accuracy", "macro_f1", "mcc", "cross_entropy", *each)
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
        """The likeliest class and the probability of each."""
        probabilities = lm.scores(batch).softmax(-1)
        best = probabilities.argmax(-1).tolist()
        return [
            {"prediction": self.names[i], "scores": dict(zip(self.names, p, strict=True))}
            for i, p in zip(best, probabilities.tolist(), strict=True)
        ]

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Counts the batch."""
        if batch.labels is None:
            raise ValueError("these rows have no labels to be scored against; use predict for them")
        scores = lm.scores(batch)
        self.metrics.update(scores.argmax(-1), batch.labels)
        self.loss.update(cross_entropy(scores, batch.labels, reduction="none"))
        targets = [self.names[i] for i in batch.labels.tolist()]
        return [{**said, "target": t} for said, t in zip(self.predict(lm, batch), targets, strict=True)]

    def compute(self) -> dict[str, Tensor]:
        """The metrics of the pass."""
        counts = self.metrics["confusion"].compute()  # [C, C]
        said = counts.sum(0) / counts.sum().clamp(min=1)
        scalars = {name: self.metrics[name].compute().float() for name in ("accuracy", "macro_f1", "mcc")}
        each = {what: zip(self.metric_names, self.metrics[what].compute(), strict=True) for what in OF_EACH_CLASS}
        return {
            **scalars,
            "cross_entropy": self.loss.compute(),
            **{f"{what}/{name}": value for what, values in each.items() for name, value in values},
            **{f"predicted/{name}": value for name, value in zip(self.metric_names, said, strict=True)},
        }

    def reset(self) -> None:
        """Forgets the pass."""
        self.metrics.reset()
        self.loss.reset()

    def figures(self) -> dict[str, Figure]:
        """The confusion matrix, in shares of each true class."""
        from lightning_softprompt.evaluation.figures import confusion_figure

        return {"confusion": confusion_figure(self.metrics["confusion"].compute().cpu(), self.metric_names)}
