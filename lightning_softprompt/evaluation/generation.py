"""Metrics of generated text, such as summaries."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement, generates
from lightning_softprompt.constraints.example import ConstrainedExample
from lightning_softprompt.core.sentences import lead
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Example
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.map_reduce import MapReduce
from lightning_softprompt.evaluation.metrics.constraints import (
    Results,
    check_answer,
    constraint_metric_names,
    summarize_constraints,
)
from lightning_softprompt.evaluation.metrics.extra_text import ExtraTextMetrics
from lightning_softprompt.evaluation.metrics.intervals import share_interval
from lightning_softprompt.evaluation.metrics.text import RougeWords
from lightning_softprompt.evaluation.metrics.text_rows import Numbers, TextRows
from lightning_softprompt.evaluation.metrics.text_scorer import Scores, TextScorer, get_references, get_source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = ("rouge1", "rouge2", "rougeL", "bleu", "chrf")
LEAD = "lead/"
FINISHED = "finished"
Records = list[dict[str, Any]]


@final
class GenerationEvaluation(Evaluation):
    """Metrics of generated text.

    Logs the selected metrics; `generated`, the number of generated answers; `length_ratio`, the ratio of answer words
    to reference words; `empty`, the fraction of empty answers; `repetition`; and with a source column `novel_bigrams`,
    `compression` (the ratio of source words to answer words), and all metrics of the lead baseline as `lead/<metric>`.
    A test also logs the 95% confidence intervals over rows as `<metric>_low` and `<metric>_high`. A validation without
    generation logs only `generated`.

    Args:
        decoding: How answers are generated (default: greedy decoding).
        source: Column of the source text, for novelty, compression and the lead baseline.
        metrics: Metrics to compute: rouge1 to rouge9, rougeL, bertscore, bleu, chrf, nist.
        lead: Number of first sentences of the source that form the lead baseline; 0 disables it.
        every: Validation generates answers every N epochs, starting with the first.
        sample: Maximum rows for which validation generates answers, the first scored ones; None for all. Test and
            predict generate answers for all rows.
        minutes: Maximum minutes that a validation spends on generation, per process. The remaining rows, which are the
            shorter ones, are not scored. None for no limit.
        stem: Whether ROUGE compares Porter stems, as in most published results.
        encoder: Encoder of BERTScore.
        rouge_words: Words that ROUGE compares: `ascii` (a-z and digits, as in published results) or `unicode` (words of
            all scripts).
        long_documents: How predict treats sources that are too long: truncate them (`cut`), or summarize their parts
            and then the summaries (`map_reduce`).
        template: Text of a row, required for map_reduce.
        max_tokens: Maximum tokens per row for map_reduce, excluding soft tokens.
        extra_metrics: Further metrics of torchmetrics. They are updated with predicted texts and references.
        constraints: Whether rows have verifiable constraints. Logs the share of constraints that answers meet,
            `constraints_strict`; of rows that meet all of theirs, `prompts_strict`; and by constraint, such as
            `no_commas_strict`; and the same with `_loose`, where the first line, the last line and markup may differ.
        counts_finished: Whether to log `finished`, the fraction of answers that ended within the maximum of tokens.

    Raises:
        ValueError: If a metric is unknown or does not compare texts, a number is too small, or arguments of map_reduce
            are missing.
    """

    def __init__(
        self,
        decoding: Decoding | None = None,
        source: str | None = None,
        metrics: Sequence[str] = DEFAULT,
        lead: int = 1,
        every: int = 1,
        sample: int | None = None,
        minutes: float | None = None,
        stem: bool = True,
        encoder: str = "all-minilm-l6-v2",
        rouge_words: RougeWords = "ascii",
        long_documents: Literal["cut", "map_reduce"] = "cut",
        template: Template | None = None,
        max_tokens: int = 512,
        extra_metrics: Sequence[Metric] = (),
        constraints: bool = False,
        counts_finished: bool = False,
    ) -> None:
        super().__init__()
        has_valid_limits = (sample is None or sample >= 1) and (minutes is None or minutes > 0)
        if lead < 0 or every < 1 or not has_valid_limits:
            raise ValueError(
                "lead must be at least 0, every and sample at least 1, and minutes above 0, got "
                f"lead={lead}, every={every}, sample={sample} and minutes={minutes}"
            )
        if long_documents == "map_reduce" and (template is None or source is None):
            raise ValueError("long_documents=map_reduce requires source and template; set both, or use cut")
        self.decoding, self.source = decoding or Decoding(), source
        self.lead = 0 if source is None else lead
        self.every, self.sample, self.minutes = every, sample, minutes
        self.long_documents, self.template, self.max_tokens = long_documents, template, max_tokens
        self.scorer = TextScorer(metrics, source, stem, encoder, rouge_words)
        self.ranking_score = next(iter([*self.scorer.rouge_names, *self.scorer.bert_names]), None)
        self.finished_names = (FINISHED,) if counts_finished else ()
        ratios = ("length_ratio", "empty", *([] if source is None else ["compression"]))
        self.constraint_names = constraint_metric_names() if constraints else []
        names = (*self.scorer.names, *self.scorer.corpus_names, *ratios)
        lead_names = [f"{LEAD}{name}" for name in names if self.lead]
        self.extra = ExtraTextMetrics(extra_metrics, {"loss", "generated", *names, *lead_names, *self.constraint_names})
        answer_names = (*names, *self.constraint_names, *self.finished_names)
        self.logged = ("generated", *answer_names, *lead_names, *self.extra.names)
        self.rows = TextRows((*self.scorer.columns, *self.finished_names))
        self.leads = TextRows(self.scorer.columns)
        self._lead_scores: dict[tuple[str, ...], Scores] = {}  # leads are the same in each epoch
        self.stage, self.generates, self.seconds = "test", True, 0.0
        self.sampled: Container[int] | None = (
            None if sample is None else range(sample)
        )  # rows to generate in validation

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """A backbone that can generate text."""
        return (generates(self.decoding.num_beams),)

    def begin(self, stage: str, epoch: int) -> None:
        """Starts an evaluation. Only validations leave rows out."""
        self.reset()
        self.stage, self.seconds = stage, 0.0
        self.generates = stage != "val" or epoch % self.every == 0

    def limit_rows(self, rows: Sequence[Sequence[int]] | None) -> None:
        """Announces which rows will be scored, and takes the sample from them."""
        if self.sample is not None:
            self.sampled = range(self.sample) if rows is None else frozenset(rows[0][: self.sample])

    def reset(self) -> None:
        """Resets the metrics."""
        self.rows.reset()
        self.leads.reset()

    @torch.no_grad()
    def predict(self, lm: PromptedLM, batch: Batch) -> Records:
        """Generates answers."""
        with self.decoding.drawing(batch.row_ids[0]):
            texts = self._generate(lm, batch)[0] if self.long_documents == "cut" else self._map_reduce(lm, batch)
        return [{"prediction": text, "scores": None} for text in texts]

    def _generate(self, lm: PromptedLM, batch: Batch) -> tuple[list[str], list[bool]]:
        """Returns the answers, and whether each of them is finished."""
        ids = lm.generate(batch, **self.decoding.options)
        codec = lm.backbone.codec
        return self.decoding.texts(codec, ids), self.decoding.are_finished(codec, ids)

    def _map_reduce(self, lm: PromptedLM, batch: Batch) -> list[str]:
        """Generates answers from complete sources, also if they are too long for a row."""
        assert self.template is not None
        assert self.source is not None
        reduce = MapReduce(lm.backbone.codec, self.template, self.source, self.max_tokens, self.decoding)
        short = [b for b, example in enumerate(require_examples(batch)) if reduce.fits(example.fields)]
        texts = self._generate(lm, select_rows(batch, short))[0] if short else []
        text_by_row = dict(zip(short, texts, strict=True))
        return [text_by_row[b] if b in text_by_row else reduce(lm, batch, b) for b in range(len(batch))]

    @torch.no_grad()
    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any] | None]:
        """Generates and scores answers. The record of a row that a validation leaves out is None."""
        records: list[dict[str, Any] | None] = [None] * len(batch)
        positions = self._rows_to_score(batch)
        if positions:
            scored = self._score(lm, select_rows(batch, positions))
            for position, record in zip(positions, scored, strict=True):
                records[position] = record
        return records

    def _rows_to_score(self, batch: Batch) -> list[int]:
        """Returns the positions of the rows that are not left out."""
        if self.stage != "val":
            return list(range(len(batch)))
        if not self.generates or (self.minutes is not None and self.seconds >= 60 * self.minutes):
            return []
        return [b for b, row in enumerate(batch.row_ids) if self.sampled is None or row in self.sampled]

    def _score(self, lm: PromptedLM, batch: Batch) -> Records:
        examples, device = require_examples(batch), lm.backbone.word_embeddings.device
        start = time.monotonic()
        with self.decoding.drawing(batch.row_ids[0]):
            texts, are_finished = self._generate(lm, batch)
        self.seconds += time.monotonic() - start
        scores = self.scorer.score(texts, examples, device)
        for row_scores, is_finished in zip(scores, are_finished, strict=True):
            row_scores.update(dict.fromkeys(self.finished_names, float(is_finished)))
        self._add(self.rows, batch, texts, scores)
        if self.lead:
            leads = [lead(get_source(example, str(self.source)), self.lead) for example in examples]
            self._add(self.leads, batch, leads, self._score_leads(leads, examples, device))
        records = []
        for text, example, row_scores in zip(texts, examples, scores, strict=True):
            logged = {name: row_scores[name] for name in (*self.scorer.names, *self.finished_names)}
            if self.constraint_names:
                logged |= summarize_constraints([check_constraints(text, example)], with_intervals=False)
            records.append({"prediction": text, "target": get_references(example)[0], "scores": logged})
        return records

    def _add(self, rows: TextRows, batch: Batch, texts: Sequence[str], scores: Sequence[Scores]) -> None:
        pairs = []
        for text, example in zip(texts, require_examples(batch), strict=True):
            results = check_constraints(text, example) if self.constraint_names else {}
            pairs.append({"prediction": text, "references": get_references(example), **results})
        rows.update(batch.row_ids, [list(row_scores.values()) for row_scores in scores], pairs)

    def _score_leads(self, leads: Sequence[str], examples: Sequence[Example], device: torch.device) -> list[Scores]:
        keys = [
            (text, get_source(example, str(self.source)), *get_references(example))
            for text, example in zip(leads, examples, strict=True)
        ]
        new = [b for b, key in enumerate(keys) if key not in self._lead_scores]
        if new:
            scores = self.scorer.score([leads[b] for b in new], [examples[b] for b in new], device)
            for b, row_scores in zip(new, scores, strict=True):
                self._lead_scores[keys[b]] = row_scores
        return [self._lead_scores[key] for key in keys]

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        rows, leads = self.rows.compute(), self.leads.compute()
        metrics: Scores = {"generated": len(rows)}
        if len(rows):
            metrics |= self.scorer.summarize(rows)
            metrics |= {name: float(rows.columns[name].mean()) for name in self.finished_names}
        if self.constraint_names:
            metrics |= summarize_constraints(rows.texts, with_intervals=self.stage == "test")
        if len(rows) and self.stage == "test":
            metrics |= self.scorer.intervals(rows)
            for name in self.finished_names:
                metrics[f"{name}_low"], metrics[f"{name}_high"] = share_interval(metrics[name], len(rows))
        lead_metrics = self.scorer.summarize(leads) if len(leads) else {}
        metrics |= {f"{LEAD}{name}": value for name, value in lead_metrics.items()}
        results = {name: torch.tensor(float(value), device=self.rows.device) for name, value in metrics.items()}
        if len(rows):
            predictions = [row["prediction"] for row in rows.texts]
            results |= self.extra.compute(predictions, [row["references"] for row in rows.texts])
        return results

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return self.extra.modes.get(name) or super().mode_of(name)

    def figures(self) -> dict[str, Figure]:
        """Returns histograms of ROUGE, and ROUGE against the length of the source."""
        from lightning_softprompt.evaluation.figures import histogram_figure, length_figure

        rows, leads = self.rows.compute(), self.leads.compute()
        names = [name for name in ("rouge1", "rougeL") if name in rows.columns]
        if not len(rows) or not names:
            return {}
        values: dict[str, Numbers] = {name: rows.columns[name] for name in names}
        lead_means: Scores = {name: float(leads.columns[name].mean()) for name in names} if len(leads) else {}
        figures = {"rouge": histogram_figure(values, lead_means, f"lead-{self.lead}")}
        if self.source is not None:
            name = names[-1]
            figures[f"{name}_by_length"] = length_figure(rows.columns["source_words"], values[name], name)
        return figures


def check_constraints(answer: str, example: Example) -> dict[str, Results]:
    """Returns the results of the constraints of a row, as `constraints`.

    Raises:
        ValueError: If the row has no constraints.
    """
    if not isinstance(example, ConstrainedExample):
        raise ValueError("rows must have verifiable constraints; set data.constraints to the column that lists them")
    return {"constraints": check_answer(answer, example.constraints)}


def require_examples(batch: Batch) -> tuple[Example, ...]:
    """Returns the rows of a batch as text.

    Raises:
        ValueError: If the batch does not contain them.
    """
    if batch.examples is None:
        raise ValueError("this evaluation requires the texts of the rows; collate the batch with examples")
    return batch.examples


def select_rows(batch: Batch, positions: Sequence[int]) -> Batch:
    """Returns some rows of a batch; the batch itself if these are all rows, so that its prompt can be reused."""
    return batch if len(positions) == len(batch) else batch.only(positions)
