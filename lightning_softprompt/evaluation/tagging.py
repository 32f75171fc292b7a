"""Tagging metrics: accuracy of tags, and precision, recall and F1 of entities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, NO_TOKEN, Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.extra import ExtraMetrics
from lightning_softprompt.system.printable import metric_name

BIO = re.compile(r"O|[BI](?:-(.*))?")  # outside, or the beginning or inside of an entity, with its type
Entity = tuple[str, int, int]


@final
class TaggingEvaluation(Evaluation):
    """Metrics of token classification.

    Logs `accuracy` and `cross_entropy` over words. If all tags have the form B-TYPE, I-TYPE or O, it also logs
    `precision`, `recall` and `f1` over entities, and `f1/<type>`. An entity is correct if its type and both ends are.
    A metric with denominator 0 is 0. As in the CoNLL shared tasks, I-TYPE starts a new entity if it does not continue
    one of the same type. Words without a token in their row are not scored.

    Args:
        names: The tags in order.
        extra_metrics: Further metrics of torchmetrics. They are updated with the tag probabilities [N, C] and the tags
            [N] of all scored words.
    """

    def __init__(self, names: Sequence[str], extra_metrics: Sequence[Metric] = ()) -> None:
        super().__init__()
        self.names = tuple(names)
        self.accuracy = MulticlassAccuracy(len(names), average="micro")
        self.loss = MeanMetric()
        self.entities = EntityCounts(entity_types(names))
        self.by_class = tuple(f"f1/{metric_name(kind)}" for kind in self.entities.types if kind)
        entity_metrics = ("precision", "recall", "f1", *self.by_class) if self.entities.types else ()
        standard_names = ("accuracy", "cross_entropy", *entity_metrics)
        one_word_per_tag = (torch.eye(len(names)).softmax(-1), torch.arange(len(names)))
        self.num_words = SumMetric()
        self.extra = ExtraMetrics(extra_metrics, one_word_per_tag, {"loss", *standard_names})
        self.logged = (*standard_names, *self.extra.names)
        self.monitor = ("f1" if self.entities.types else "accuracy", "max")

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the most probable tag of each word; None if the word has no token."""
        predicted = self._tag_names(lm.scores(batch).argmax(-1), batch)
        return [{"prediction": tags, "scores": None} for tags in predicted]

    def _tag_names(self, tags: Tensor, batch: Batch) -> list[list[str | None]]:
        """Returns the names of the tags [B, W] of all words."""
        assert batch.words is not None
        rows: list[list[str | None]] = []
        for row_tags, positions in zip(tags.tolist(), batch.words.tolist(), strict=True):
            pairs = [(tag, position) for tag, position in zip(row_tags, positions, strict=True) if position != IGNORE]
            rows.append([None if position == NO_TOKEN else self.names[tag] for tag, position in pairs])
        return rows

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Adds a batch to the metrics and returns its records."""
        if batch.labels is None:
            raise ValueError("rows without tags cannot be scored; use predict")
        scores, scored = lm.scores(batch), batch.labels != IGNORE
        self.accuracy.update(scores[scored].argmax(-1), batch.labels[scored])
        self.loss.update(cross_entropy(scores[scored], batch.labels[scored], reduction="none"))
        self.extra.update(scores[scored].float().softmax(-1), batch.labels[scored])
        self.num_words.update(scored.sum())
        targets = self._tag_names(batch.labels, batch)
        records = [{**record, "target": tags} for record, tags in zip(self.predict(lm, batch), targets, strict=True)]
        self.entities.update([(record["prediction"], record["target"]) for record in records])
        return records

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        words = {"accuracy": self.accuracy.compute(), "cross_entropy": self.loss.compute()}
        extra = self.extra.compute() if self.num_words.compute() > 0 else {}
        return {**words, **self.entities.compute(), **extra}

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return self.extra.modes.get(name) or super().mode_of(name)

    def reset(self) -> None:
        """Resets the metrics."""
        for metric in (self.accuracy, self.loss, self.entities, self.num_words, self.extra):
            metric.reset()


class EntityCounts(Metric):
    """Precision, recall and F1 of entities, overall and for each type.

    Args:
        types: Types of entities; if there are none, there are no metrics.
    """

    full_state_update = False
    counts: Tensor  # [types, 3] number of correct, predicted and true entities

    def __init__(self, types: Sequence[str]) -> None:
        super().__init__()
        self.types = tuple(types)
        self.add_state("counts", torch.zeros(len(types), 3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rows: Sequence[tuple[Sequence[str | None], Sequence[str | None]]]) -> None:
        """Counts the entities of rows, each given as its predicted and its true tags."""
        counts = torch.zeros(self.counts.shape, dtype=torch.long)
        for predicted_tags, true_tags in rows if self.types else ():
            predicted, true = find_entities(predicted_tags), find_entities(true_tags)
            for column, group in enumerate((predicted & true, predicted, true)):
                for kind, *_ in group:
                    counts[self.types.index(kind), column] += 1
        self.counts += counts.to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics; none if there are no types."""
        if not self.types:
            return {}
        correct, predicted, true = self.counts.sum(0)
        metrics = {
            "precision": divide(correct, predicted),
            "recall": divide(correct, true),
            "f1": divide(2 * correct, predicted + true),
        }
        for kind, (correct, predicted, true) in zip(self.types, self.counts.unbind(0), strict=True):
            if kind:
                metrics[f"f1/{metric_name(kind)}"] = divide(2 * correct, predicted + true)
        return metrics


def divide(part: Tensor, whole: Tensor) -> Tensor:
    """Returns a ratio of counts; 0 if the denominator is 0."""
    return part / whole.clamp(min=1)


def entity_types(names: Sequence[str]) -> list[str]:
    """Returns the entity types of tags; none if a tag does not have the form B-TYPE, I-TYPE or O.

    >>> entity_types(["O", "B-PER", "I-PER", "B-LOC"]), entity_types(["O", "NOUN"])
    (['LOC', 'PER'], [])
    """
    matches = [BIO.fullmatch(name) for name in names]
    if not all(matches):
        return []
    return sorted({match[1] or "" for match in matches if match and match[0] != "O"})


def find_entities(tags: Sequence[str | None]) -> set[Entity]:
    """Returns type, start and end (exclusive) of each entity; words without a tag are skipped.

    >>> sorted(find_entities(["B-PER", "I-PER", "B-PER", "O", "I-LOC", "I-PER"]))
    [('LOC', 4, 5), ('PER', 0, 2), ('PER', 2, 3), ('PER', 5, 6)]
    """
    entities: set[Entity] = set()
    kind, start = None, 0
    for position, tag in enumerate([*(tag for tag in tags if tag is not None), "O"]):
        prefix, _, name = tag.partition("-")
        if prefix == "I" and name == kind:
            continue
        if kind is not None:
            entities.add((kind, start, position))
        kind, start = (None if prefix == "O" else name), position
    return entities
