"""Measures a prompt on wordings of the same rows that its training did not use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import torch

from lightning_softprompt.core.types import IGNORE, Encoded, Example
from lightning_softprompt.data.augmentation.base import Draft, RowText
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.methods.base import SoftPromptModule

Wording = Callable[[Draft], Draft | None]  # None for a row that has no such wording
Metric = Literal["loss", "accuracy"]
Row = tuple[int, Encoded, Example]


@dataclass(frozen=True)
class WordingScore:
    """A metric on rows in wordings of the training and in others.

    Args:
        metric: The metric: the mean loss per target token of a row, or its accuracy.
        seen: The value of each row, the mean over the wordings of the training.
        unseen: The value of each row, the mean over the other wordings.
    """

    metric: Metric
    seen: Sequence[float]
    unseen: Sequence[float]

    @property
    def difference(self) -> float:
        """The mean over rows of unseen minus seen."""
        return fmean(self.unseen) - fmean(self.seen)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference, a bootstrap over rows."""
        return bootstrap([unseen - seen for unseen, seen in zip(self.unseen, self.seen, strict=True)])


def use_template(template: str) -> Wording:
    """Returns the wording that writes each row with a template."""
    return lambda draft: replace(draft, template=template)


def use_paraphrase(column: str, paraphrases: Mapping[str, Sequence[str]], number: int) -> Wording:
    """Returns the wording that replaces a column by its paraphrase of a number; other rows do not have it."""

    def reword(draft: Draft) -> Draft | None:
        texts = paraphrases.get(draft.columns[column], ())
        if number >= len(texts):
            return None
        return replace(draft, columns={**draft.columns, column: texts[number]})

    return reword


@torch.no_grad()
def compare_wordings(
    method: SoftPromptModule,
    data: SoftPromptDataModule,
    seen: Sequence[Wording],
    unseen: Sequence[Wording],
    most_rows: int | None = None,
) -> list[WordingScore]:
    """Measures the test rows in each wording: loss, and accuracy if the task has classes.

    Rows that lack a wording of both kinds are left out.

    Args:
        method: The trained method.
        data: The data module, whose test rows are used.
        seen: Wordings of the training.
        unseen: Other wordings.
        most_rows: Maximum number of rows (default: all).

    Raises:
        ValueError: If no row has wordings of both kinds.
    """
    method.eval()
    examples = data.split("test").examples[:most_rows]
    by_kind = []
    for wordings in (seen, unseen):
        values: list[list[dict[Metric, float]]] = [[] for _ in examples]
        for wording in wordings:
            for row, metrics in _measure(method, data, examples, wording).items():
                values[row].append(metrics)
        by_kind.append(values)
    rows = [row for row in range(len(examples)) if by_kind[0][row] and by_kind[1][row]]
    if not rows:
        raise ValueError("no test row has both a wording of the training and another one")
    names: list[Metric] = list(by_kind[0][rows[0]][0])
    scores = []
    for name in names:
        seen_means, unseen_means = (_row_means(values, rows, name) for values in by_kind)
        scores.append(WordingScore(name, seen_means, unseen_means))
    return scores


def _row_means(values: Sequence[Sequence[Mapping[Metric, float]]], rows: Sequence[int], name: Metric) -> list[float]:
    """Returns the mean of a metric over the wordings of each row."""
    return [fmean(metrics[name] for metrics in values[row]) for row in rows]


def _measure(
    method: SoftPromptModule, data: SoftPromptDataModule, examples: Sequence[Example], wording: Wording
) -> dict[int, dict[Metric, float]]:
    """Returns the metrics of each row that has a wording."""
    text = data.row_text
    rows: list[Row] = []
    for row, example in enumerate(examples):
        draft = wording(text.read(example))
        if draft is not None:
            rows.append((row, *text.write(example, draft)))
    device = method.loaded.word_embeddings.device
    metrics: dict[int, dict[Metric, float]] = {}
    for begin in range(0, len(rows), data.eval_batch_size):
        batch = data.collate(rows[begin : begin + data.eval_batch_size]).to(device)
        lm = method.lm()
        counts = (batch.targets != IGNORE).sum(1).clamp(min=1)
        losses = (lm.cross_entropy(batch).sum(1) / counts).tolist()
        correct = None
        if data.classes is not None and batch.labels is not None:
            correct = (lm.scores(batch).argmax(-1) == batch.labels).tolist()
        for position, row in enumerate(batch.row_ids):
            metrics[row] = {"loss": losses[position]}
            if correct is not None:
                metrics[row]["accuracy"] = float(correct[position])
    return metrics


def check_wordings(text: RowText, templates: Sequence[str]) -> None:
    """Refuses templates that cannot replace that of the data module.

    Raises:
        ValueError: With the reason.
    """
    for template in templates:
        text.check_template(template)
