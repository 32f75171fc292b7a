"""The likelihood of documents: loss and perplexity per token, per word and per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, Batch, windows_of
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.intervals import bootstrap_ratio
from lightning_softprompt.evaluation.metrics.text_rows import Numbers, TextRows
from lightning_softprompt.evaluation.words.cloze import ClozeQuestion, ClozeTest, summarize_results
from lightning_softprompt.evaluation.words.word_nats import NATS, WORDS, WordNats, summarize_words

COUNTS = ("nats", "tokens", "words", "bytes")
COLUMNS = (*COUNTS, "document", "corpus")
BITS = "bits_per_byte"
PER_TOKEN = ("cross_entropy", "perplexity")
METRICS = (*PER_TOKEN, "word_perplexity", "byte_perplexity", BITS, "tokens_per_word")


@final
class LikelihoodEvaluation(Evaluation):
    """Loss and perplexity of documents, from sums over all windows.

    Logs `cross_entropy` in nats per token and `perplexity` per token, which can be compared for one tokenizer only;
    `word_perplexity`, `byte_perplexity` and `bits_per_byte`, which can be compared for all models, since words and
    bytes are those of the text; and `tokens_per_word`. A test also logs the 95 % bootstrap interval of `bits_per_byte`
    over documents, as `bits_per_byte_low` and `bits_per_byte_high`, and the numbers of `documents` and `tokens`; with
    `word_nats`, the mean nats of a word by its number of occurrences in the training documents, such as
    `nats_by_frequency/1-4`; with `cloze`, the share of the questions for which the correct term is the most probable
    candidate (`cloze@1`) and the share of the terms of which each token is the most probable one: `cloze_greedy` of
    decoders, given the text before it, and `cloze_joint` of encoders, given the text on both sides, with
    `cloze_tokens`, the share of their tokens.

    If a part of the tokens is predicted, as by masked language modeling, only the metrics per token are defined.

    Args:
        corpora: Names of further corpora, whose metrics are logged as `<corpus>/<metric>`.
        is_complete: Whether all tokens are predicted, each from the tokens before it.
        cloze: Questions about terms, which a test asks in addition.
        word_nats: Measures the words of the main corpus by their frequency, in a test.
    """

    def __init__(
        self,
        corpora: Sequence[str] = (),
        is_complete: bool = True,
        cloze: ClozeTest | None = None,
        word_nats: WordNats | None = None,
    ) -> None:
        super().__init__()
        self.is_complete = is_complete
        self.cloze, self.word_nats = cloze, word_nats if is_complete else None
        self._questions: dict[int, list[ClozeQuestion]] = {}  # of each row that has some
        self._location = "end"  # of the answers of the backbone
        self.names = METRICS if is_complete else PER_TOKEN
        self.score = BITS if is_complete else PER_TOKEN[0]
        self.monitor = (self.score, "min")
        self.corpora = ("", *corpora)
        self.windows = TextRows((*COLUMNS, *NATS, *WORDS) if self.word_nats else COLUMNS)
        self.logged = tuple(f"{prefix_of(corpus)}{metric}" for corpus in self.corpora for metric in self.names)

    def limit_rows(self, rows: Sequence[Sequence[int]] | None) -> None:
        """Distributes the questions of a test over the rows of the main corpus."""
        if self.cloze is not None and self.stage == "test":
            self._questions = self.cloze.assign(None if rows is None else rows[0])

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the likelihood of each window."""
        return self._records(self._measure(lm, batch), batch)

    def _measure(self, lm: PromptedLM, batch: Batch) -> list[dict[str, float]]:
        losses = lm.cross_entropy(batch).double()
        nats, tokens = losses.sum(1).tolist(), (batch.targets != IGNORE).sum(1).tolist()
        rows = zip(nats, tokens, windows_of(batch), strict=True)
        return [
            {
                "nats": of_row,
                "tokens": count,
                "words": window.num_words,
                "bytes": window.num_bytes,
                "document": window.document,
                "corpus": self.corpora.index(window.corpus),
            }
            for of_row, count, window in rows
        ]

    def _records(self, measures: Sequence[dict[str, float]], batch: Batch) -> list[dict[str, Any]]:
        records = []
        for row, window in zip(measures, windows_of(batch), strict=True):
            score = bits_per_byte(row["nats"], row["bytes"]) if self.is_complete else row["nats"] / row["tokens"]
            unit = "bits per byte" if self.is_complete else "nats per token"
            details: dict[str, Any] = {name: row[name] for name in (*COUNTS, "document")}
            if len(self.corpora) > 1:
                details["corpus"] = window.corpus
            records.append({"prediction": f"{score:.4f} {unit}", "scores": {self.score: score}, "details": details})
        return records

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Adds a batch to the metrics and returns its records."""
        measures = self._measure(lm, batch)
        if self.word_nats is not None:
            measures = [row | words for row, words in zip(measures, self._measure_words(lm, batch), strict=True)]
        answers = self._ask(lm, batch)
        table = [[row[name] for name in self.windows.columns] for row in measures]
        self.windows.update(batch.row_ids, table, answers)
        records = self._records(measures, batch)
        for record, window, answer in zip(records, windows_of(batch), answers, strict=True):
            record["target"] = window.target
            record["details"] |= answer
        return records

    def _measure_words(self, lm: PromptedLM, batch: Batch) -> list[dict[str, float]]:
        """Returns the losses of words by their frequency, which are 0 for further corpora and in validation."""
        assert self.word_nats is not None
        nothing = dict.fromkeys((*NATS, *WORDS), 0.0)
        if self.stage != "test":
            return [nothing] * len(batch)
        losses = lm.cross_entropy(batch).double()
        measures = []
        for of_row, targets, window in zip(losses, batch.targets, windows_of(batch), strict=True):
            of_tokens = of_row[targets != IGNORE].tolist()
            is_main = not window.corpus
            codec = lm.backbone.codec
            measures.append(self.word_nats.measure(codec, window.target, of_tokens) if is_main else nothing)
        return measures

    def _ask(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns the answers to the questions of each row, as `cloze`; empty for rows without questions."""
        if self.cloze is None or self.stage != "test":
            return [{} for _ in batch.row_ids]
        self._location = lm.backbone.codec.answer_location
        device = batch.input_ids.device
        answers: list[dict[str, Any]] = []
        for row in batch.row_ids:
            results = [self.cloze.ask(lm, question, device) for question in self._questions.get(row, [])]
            answers.append({"cloze": results} if results else {})
        return answers

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics of each corpus that was scored."""
        rows = self.windows.compute()
        metrics: dict[str, float] = {}
        for number, corpus in enumerate(self.corpora):
            is_here = rows.columns["corpus"] == number
            if is_here.any():
                columns = {name: values[is_here] for name, values in rows.columns.items()}
                of_corpus = summarize(columns, self.is_complete, with_intervals=self.stage == "test")
                metrics |= {f"{prefix_of(corpus)}{name}": value for name, value in of_corpus.items()}
        if self.word_nats is not None and self.stage == "test":
            metrics |= summarize_words({name: float(rows.columns[name].sum()) for name in (*NATS, *WORDS)})
        if results := [result for text in rows.texts for result in text.get("cloze", [])]:
            metrics |= summarize_results(results, self._location, with_intervals=self.stage == "test")
        return {name: torch.tensor(value, device=self.windows.device) for name, value in metrics.items()}

    def reset(self) -> None:
        """Resets the metrics."""
        self.windows.reset()

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns `min`, since lower is better, except for the accuracy of questions."""
        return "max" if name.startswith("cloze") else "min"


def prefix_of(corpus: str) -> str:
    """Returns the prefix of the metrics of a corpus, which is empty for the main corpus."""
    return f"{corpus}/" if corpus else ""


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Returns the bits per byte of a text.

    >>> bits_per_byte(math.log(2), 1)
    1.0
    """
    return nats / (max(1, num_bytes) * math.log(2))


def summarize(columns: dict[str, Numbers], is_complete: bool, with_intervals: bool) -> dict[str, float]:
    """Returns the metrics of windows.

    Args:
        columns: The columns of all windows by name, each [R].
        is_complete: Whether all tokens were predicted.
        with_intervals: Whether to add intervals over documents, and the numbers of documents and tokens.
    """
    nats, tokens, words, num_bytes = (float(columns[name].sum()) for name in COUNTS)
    metrics = {"cross_entropy": nats / tokens, "perplexity": exponential(nats / tokens)}
    if is_complete:
        metrics |= {
            "word_perplexity": exponential(nats / max(1.0, words)),
            "byte_perplexity": exponential(nats / num_bytes),
            BITS: bits_per_byte(nats, num_bytes),
            "tokens_per_word": tokens / max(1.0, words),
        }
    if with_intervals:
        name, unit = (BITS, "bytes") if is_complete else ("cross_entropy", "tokens")
        low, high, documents = interval_over_documents(columns, math.log(2) if is_complete else 1.0, unit)
        metrics |= {f"{name}_low": low, f"{name}_high": high, "documents": float(documents), "tokens": tokens}
    return metrics


def interval_over_documents(
    columns: dict[str, Numbers], nats_per_unit: float, denominator: str
) -> tuple[float, float, int]:
    """Returns the 95 % interval of a mean loss over documents, and their number.

    Args:
        columns: The columns of all windows by name, each [R].
        nats_per_unit: Nats of the unit of the loss.
        denominator: The column by which the sum of losses is divided.
    """
    documents, rows = np.unique(columns["document"], return_inverse=True)
    losses = np.bincount(rows, columns["nats"] / nats_per_unit)
    sizes = np.bincount(rows, columns[denominator])
    low, high = bootstrap_ratio(losses.tolist(), sizes.tolist())
    return low, high, len(documents)


def exponential(value: float) -> float:
    """Returns e to the power of a value; infinity if it is too large, as for a text of very long words.

    >>> exponential(0.0), exponential(1e4)
    (1.0, inf)
    """
    return math.exp(value) if value < math.log(np.finfo(np.float64).max) else math.inf
