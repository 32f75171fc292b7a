"""Scores generated texts: scores of each text, and their summary over a split."""

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
    CORPUS_METRICS,
    RESAMPLED_METRICS,
    ROW_METRICS,
    Rouge,
    RougeWords,
    bootstrap_corpus,
    check_metrics,
    novel_bigrams,
    repetition,
    words,
)
from lightning_softprompt.evaluation.metrics.text_rows import GatheredRows

COUNTS = ("words", "reference_words", "source_words")
Scores = dict[str, float]


@final
class TextScorer:
    """Scores texts with the selected metrics.

    Args:
        metrics: Names of metrics. Corpus metrics such as BLEU are computed from all texts of a split.
        source: Column of the source text.
        stem: Whether ROUGE compares Porter stems.
        encoder: Encoder of BERTScore.
        rouge_words: Words that ROUGE compares.

    Raises:
        ValueError: If a metric is unknown.
    """

    def __init__(
        self, metrics: Sequence[str], source: str | None, stem: bool, encoder: str, rouge_words: RougeWords = "ascii"
    ) -> None:
        check_metrics(metrics)
        self.rouge_names = [name for name in ROW_METRICS if name in metrics and name != BERTSCORE]
        self.bert_names = [BERTSCORE] if BERTSCORE in metrics else []
        self.corpus_names = [name for name in CORPUS_METRICS if name in metrics]
        self.source, self.encoder = source, encoder
        self.rouge = Rouge(self.rouge_names, stem, rouge_words)
        source_names = [] if source is None else ["novel_bigrams"]
        self.names = (*self.rouge_names, *self.bert_names, *source_names, "repetition")  # averaged over rows

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers that are kept for each row."""
        return (*self.names, *COUNTS)

    def score(self, texts: Sequence[str], examples: Sequence[Example], device: torch.device) -> list[Scores]:
        """Returns the numbers of each text, in the order of `columns`."""
        references = [get_references(example) for example in examples]
        similarities = [0.0] * len(texts)
        if self.bert_names:
            similarities = bert_scores(texts, references, self.encoder, device)
        scores = []
        for text, row_references, example, similarity in zip(texts, references, examples, similarities, strict=True):
            row = self.rouge(text, row_references)
            row |= dict.fromkeys(self.bert_names, similarity)
            row |= self._count(text, row_references, example)
            scores.append(row)
        return scores

    def _count(self, text: str, references: Sequence[str], example: Example) -> Scores:
        source = None if self.source is None else get_source(example, self.source)
        novelty = {} if source is None else {"novel_bigrams": novel_bigrams(text, source)}
        return {
            **novelty,
            "repetition": repetition(text),
            "words": len(words(text)),
            "reference_words": sum(len(words(reference)) for reference in references) / len(references),
            "source_words": len(words(source or "")),
        }

    def summarize(self, rows: GatheredRows) -> Scores:
        """Returns the metrics of at least one row."""
        texts, references = _split_pairs(rows)
        total = {name: max(1.0, float(rows.columns[name].sum())) for name in COUNTS}
        metrics = {name: float(values.mean()) for name, values in _select_defined_columns(rows, self.names).items()}
        metrics |= {name: CORPUS_METRICS[name](texts, references) for name in self.corpus_names}
        metrics["length_ratio"] = float(rows.columns["words"].sum()) / total["reference_words"]
        metrics["empty"] = float(np.mean([not text.strip() for text in texts]))
        if self.source is not None:
            metrics["compression"] = total["source_words"] / total["words"]
        return metrics

    def intervals(self, rows: GatheredRows) -> Scores:
        """Returns the bootstrap 95% confidence intervals over rows."""
        ends = {name: bootstrap(values.tolist()) for name, values in _select_defined_columns(rows, self.names).items()}
        texts, references = _split_pairs(rows)
        for name in self.corpus_names:
            if name in RESAMPLED_METRICS:
                ends[name] = bootstrap_corpus(name, texts, references)
        lows = {f"{name}_low": low for name, (low, _) in ends.items()}
        highs = {f"{name}_high": high for name, (_, high) in ends.items()}
        return {**lows, **highs}


def _split_pairs(rows: GatheredRows) -> tuple[list[str], list[list[str]]]:
    """Returns the predictions and the references of rows."""
    return [pair["prediction"] for pair in rows.texts], [pair["references"] for pair in rows.texts]


def _select_defined_columns(rows: GatheredRows, names: Sequence[str]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Returns the columns that are defined for at least one row."""
    columns = {name: select_defined(rows, name) for name in names}
    return {name: values for name, values in columns.items() if len(values)}


def select_defined(rows: GatheredRows, name: str) -> np.ndarray:  # type: ignore[type-arg]
    """Returns a column [R] of the rows for which it is defined; an empty answer, for example, has no bigrams."""
    values = rows.columns[name]
    return values[~np.isnan(values)]


def compute_means(rows: GatheredRows, names: Sequence[str], with_intervals: bool) -> dict[str, float]:
    """Returns the means of columns, and optionally their 95% confidence intervals as `_low` and `_high`."""
    columns = _select_defined_columns(rows, names)
    means = {name: float(values.mean()) for name, values in columns.items()}
    if with_intervals:
        for name, values in columns.items():
            means[f"{name}_low"], means[f"{name}_high"] = bootstrap(values.tolist())
    return means


def get_references(example: Example) -> tuple[str, ...]:
    """Returns the references of a row: its target if it has no others."""
    return example.references or (example.target,)


def get_source(example: Example, column: str) -> str:
    """Returns the source text of a row.

    Raises:
        ValueError: If the template does not contain the column.
    """
    if column not in example.fields:
        raise ValueError(f"the template has no source column {column!r}; its columns are {sorted(example.fields)}")
    return example.fields[column]
