"""Accuracy of tags, and precision, recall and F1 of the entities that they mark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, NO_TOKEN, Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.system.printable import metric_name

BIO = re.compile(r"O|[BI](?:-(.*))?")  # outside, or beginning or inside of an entity of some type
Entity = tuple[str, int, int]


@final
class TaggingEvaluation(Evaluation):
    """Metrics of a task with a tag for each word.

    Logs `accuracy` and `cross_entropy` over words. Where all tags are of the form B-TYPE, I-TYPE or O, it also logs
    `precision`, `recall` and `f1` over entities, which are right if both ends and the type are, and `f1/<type>`; each
    is 0 where there is nothing to divide by. As in CoNLL's shared tasks, I-TYPE begins an entity where none of its type
    goes on. Words that have no token in their row are left out.

    Args:
        names: The tags in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.accuracy = MulticlassAccuracy(len(names), average="micro")
        self.loss = MeanMetric()
        self.entities = EntityCounts(entity_types(names))
        types = [f"f1/{metric_name(kind)}" for kind in self.entities.types if kind]
        of_entities = ("precision", "recall", "f1", *types) if self.entities.types else ()
        self.logged = ("accuracy", "cross_entropy", *of_entities)
        self.monitor = ("f1" if self.entities.types else "accuracy", "max")

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """The likeliest tag of each word, None where it has no token."""
        return [{"prediction": tags, "scores": None} for tags in self._named(lm.scores(batch).argmax(-1), batch)]

    def _named(self, tags: Tensor, batch: Batch) -> list[list[str | None]]:
        assert batch.words is not None
        rows = zip(tags.tolist(), batch.words.tolist(), strict=True)
        return [
            [None if at == NO_TOKEN else self.names[tag] for tag, at in zip(*row, strict=True) if at != IGNORE]
            for row in rows
        ]

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Counts the batch."""
        if batch.labels is None:
            raise ValueError("these rows have no tags to be scored against; use predict for them")
        scores, scored = lm.scores(batch), batch.labels != IGNORE
        self.accuracy.update(scores[scored].argmax(-1), batch.labels[scored])
        self.loss.update(cross_entropy(scores[scored], batch.labels[scored], reduction="none"))
        said, true = self.predict(lm, batch), self._named(batch.labels, batch)
        records = [{**record, "target": tags} for record, tags in zip(said, true, strict=True)]
        self.entities.update([(record["prediction"], record["target"]) for record in records])
        return records

    def compute(self) -> dict[str, Tensor]:
        """The metrics of the pass."""
        words = {"accuracy": self.accuracy.compute(), "cross_entropy": self.loss.compute()}
        return {**words, **self.entities.compute()}

    def reset(self) -> None:
        """Forgets the pass."""
        for metric in (self.accuracy, self.loss, self.entities):
            metric.reset()


class EntityCounts(Metric):
    """Precision, recall and F1 of entities, together and of each type.

    Args:
        types: Of entities; without any there is nothing to count.
    """

    full_state_update = False
    counts: Tensor  # [types, 3] entities that are right, were said, and are there

    def __init__(self, types: Sequence[str]) -> None:
        super().__init__()
        self.types = tuple(types)
        self.add_state("counts", torch.zeros(len(types), 3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rows: Sequence[tuple[Sequence[str | None], Sequence[str | None]]]) -> None:
        """Counts rows, each as what was said and what is true of its words."""
        counts = torch.zeros(self.counts.shape, dtype=torch.long)
        for said, true in rows if self.types else ():
            found, there = entities(said), entities(true)
            for which, some in enumerate((found & there, found, there)):
                for kind, *_ in some:
                    counts[self.types.index(kind), which] += 1
        self.counts += counts.to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """The metrics, none without types."""
        if not self.types:
            return {}
        right, said, there = self.counts.sum(0)
        each = zip(self.types, self.counts.unbind(0), strict=True)
        return {
            "precision": share(right, said),
            "recall": share(right, there),
            "f1": share(2 * right, said + there),
            **{f"f1/{metric_name(kind)}": share(2 * of[0], of[1] + of[2]) for kind, of in each if kind},
        }


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Part of a whole; 0 of nothing."""
    return part / whole.clamp(min=1)


def entity_types(names: Sequence[str]) -> list[str]:
    """The types of entities that tags can mark; none where any of them is not of the form B-TYPE, I-TYPE or O.

    >>> entity_types(["O", "B-PER", "I-PER", "B-LOC"]), entity_types(["O", "NOUN"])
    (['LOC', 'PER'], [])
    """
    found = [BIO.fullmatch(name) for name in names]
    return sorted({match[1] or "" for match in found if match and match[0] != "O"}) if all(found) else []


def entities(tags: Sequence[str | None]) -> set[Entity]:
    """Type, first word and word behind the last of each entity; words without a tag are passed over.

    >>> sorted(entities(["B-PER", "I-PER", "B-PER", "O", "I-LOC", "I-PER"]))
    [('LOC', 4, 5), ('PER', 0, 2), ('PER', 2, 3), ('PER', 5, 6)]
    """
    found: set[Entity] = set()
    kind, start = None, 0
    for at, tag in enumerate([*(tag for tag in tags if tag is not None), "O"]):
        mark, _, name = tag.partition("-")
        if mark == "I" and name == kind:
            continue
        if kind is not None:
            found.add((kind, start, at))
        kind, start = (None if mark == "O" else name), at
    return found
