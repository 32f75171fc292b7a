"""How texts are scored: the measures of each, and what they come to over a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch

from lightning_softprompt.core.types import Example
from lightning_softprompt.evaluation.metrics.bert_score import bert_scores
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.text import (
    BERTSCORE,
    OF_ROWS,
    OF_SPLITS,
    RESAMPLED,
    Rouge,
    RougeWords,
    bootstrap_of_split,
    check_metrics,
    novel_bigrams,
    repetition,
    words,
)
from lightning_softprompt.evaluation.metrics.text_rows import Gathered

COUNTS = ("words", "reference_words", "source_words")
Measures = dict[str, float]


@final
class TextScoring:
    """Scores texts by the metrics of a task.

    Args:
        metrics: By name; those of whole splits are computed from all texts.
        source: The column that a text is made from.
        stem: Whether ROUGE compares Porter's stems.
        encoder: The encoder of BERTScore.
        rouge_words: Which letters make words of ROUGE.

    Raises:
        ValueError: If a metric is unknown.
    """

    def __init__(
        self, metrics: Sequence[str], source: str | None, stem: bool, encoder: str, rouge_words: RougeWords = "ascii"
    ) -> None:
        check_metrics(metrics)
        self.rouges = [name for name in OF_ROWS if name in metrics and name != BERTSCORE]
        self.near = [BERTSCORE] if BERTSCORE in metrics else []
        self.of_splits = [name for name in OF_SPLITS if name in metrics]
        self.source, self.encoder = source, encoder
        self.rouge = Rouge(self.rouges, stem, rouge_words)
        of_source = [] if source is None else ["novel_bigrams"]
        self.scores = (*self.rouges, *self.near, *of_source, "repetition")  # of a row, and their mean of a pass

    @property
    def columns(self) -> tuple[str, ...]:
        """The measures of a row."""
        return (*self.scores, *COUNTS)

    def measures(self, texts: Sequence[str], examples: Sequence[Example], device: torch.device) -> list[Measures]:
        """Those of each text beside its row, in the order of the columns."""
        right = [references_of(example) for example in examples]
        near = bert_scores(texts, right, self.encoder, device) if self.near else [0.0] * len(texts)
        found = []
        for text, references, example, score in zip(texts, right, examples, near, strict=True):
            measures = self.rouge(text, references)
            measures |= dict.fromkeys(self.near, score)
            found.append(measures | self._plain(text, references, example))
        return found

    def _plain(self, text: str, references: Sequence[str], example: Example) -> Measures:
        source = None if self.source is None else source_of(example, self.source)
        novel = {} if source is None else {"novel_bigrams": novel_bigrams(text, source)}
        return {
            **novel,
            "repetition": repetition(text),
            "words": len(words(text)),
            "reference_words": sum(len(words(reference)) for reference in references) / len(references),
            "source_words": len(words(source or "")),
        }

    def summary(self, rows: Gathered) -> Measures:
        """The metrics of all rows, of which there is at least one."""
        said, right = [text["said"] for text in rows.texts], [text["right"] for text in rows.texts]
        means = {name: float(known(rows, name).mean()) for name in self.scores if len(known(rows, name))}
        total = {name: max(1.0, float(rows.columns[name].sum())) for name in COUNTS}
        shorter = {} if self.source is None else {"compression": total["source_words"] / total["words"]}
        return {
            **means,
            **{name: OF_SPLITS[name](said, right) for name in self.of_splits},
            "length_ratio": float(rows.columns["words"].sum()) / total["reference_words"],
            "empty": float(np.mean([not text.strip() for text in said])),
            **shorter,
        }

    def intervals(self, rows: Gathered) -> Measures:
        """Both ends of the 95 % interval over rows, by resampling them."""
        ends = {name: bootstrap(known(rows, name).tolist()) for name in self.scores if len(known(rows, name))}
        said, right = [text["said"] for text in rows.texts], [text["right"] for text in rows.texts]
        ends |= {name: bootstrap_of_split(name, said, right) for name in self.of_splits if name in RESAMPLED}
        low, high = ({f"{name}_{end}": of[i] for name, of in ends.items()} for i, end in enumerate(("low", "high")))
        return {**low, **high}


def known(rows: Gathered, name: str) -> np.ndarray:  # type: ignore[type-arg]
    """A measure [R] of those rows that have it: an empty answer has no bigrams of which some might be new."""
    values = rows.columns[name]
    return values[~np.isnan(values)]


def means_of(rows: Gathered, names: Sequence[str], intervals: bool) -> dict[str, float]:
    """Means of measures over the rows that have them, and the ends of their 95 % intervals as `_low` and `_high`."""
    values = {name: known(rows, name) for name in names if len(known(rows, name))}
    means = {name: float(of.mean()) for name, of in values.items()}
    for name, of in values.items() if intervals else ():
        means[f"{name}_low"], means[f"{name}_high"] = bootstrap(of.tolist())
    return means


def references_of(example: Example) -> tuple[str, ...]:
    """What is right for a row."""
    return example.references or (example.target,)


def source_of(example: Example, column: str) -> str:
    """The text that a row's answer is made from.

    Raises:
        ValueError: If the row has no such column.
    """
    if column not in example.fields:
        raise ValueError(f"source is to be column {column!r}, but the template names {sorted(example.fields)}")
    return example.fields[column]
