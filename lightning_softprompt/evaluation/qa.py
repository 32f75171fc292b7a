"""Metrics of question answering: of answers, their grounding and citations, and of retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement, generates
from lightning_softprompt.core.types import Batch, Example
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.generation import require_examples
from lightning_softprompt.evaluation.metrics.answers import (
    ANSWER_SCORES,
    answer_scores,
    contain_answer,
    content_words,
    grounded_fraction,
    same_answer,
    split_citations,
)
from lightning_softprompt.evaluation.metrics.extra_text import ExtraTextMetrics
from lightning_softprompt.evaluation.metrics.retrieval import (
    FOUND,
    SEARCHED,
    names_to_report,
    retrieval_names,
    search_scores,
)
from lightning_softprompt.evaluation.metrics.text import Rouge, RougeWords
from lightning_softprompt.evaluation.metrics.text_rows import TextRows
from lightning_softprompt.evaluation.metrics.text_scorer import compute_means, get_references

NAN = float("nan")
ROUGE = "rougeL"
PASSAGE_SCORES = ("grounded", "answerable")
ABSTAINED = "abstained"
ABSTENTION_SCORES = ("abstain_precision", "abstain_recall", "has_answer/exact_match", "has_answer/f1")
CITATION_SCORES = ("cite_precision", "cite_recall")
Answer = tuple[str, list[int]]  # an answer, and the numbers of the passages that it cites
Scores = dict[str, float]


@final
class QaEvaluation(Evaluation):
    """Metrics of question answering.

    Logs `exact_match`, `precision`, `recall` and `f1` of words, and `contains`, the fraction of answers that contain a
    correct one. Each is the best over the references, and ignores case, punctuation and English articles. Also logs
    `empty`, the fraction of empty answers, and `generated`, the number of rows. If rows include passages, it logs
    `grounded`, the fraction of an answer's words that occur in the passages, and `answerable`, the fraction of rows
    whose passages contain a correct answer. If gold documents are known, it logs `hit@k`, `recall@k`, `precision@k` and
    `ndcg@k` for k = 1, 5, 10 (up to the depth of the search), and `mrr`. A test also logs 95% confidence intervals over
    rows as `<metric>_low` and `<metric>_high`.

    If `abstain` is set, rows without references are unanswerable. The only correct answer to them is the abstain text,
    which is always wrong for answerable rows, whatever words it shares with the references (Rajpurkar et al. 2018,
    1806.03822). Logs `abstained`, the fraction of answers that are the abstain text; `abstain_precision`, the fraction
    of these that belong to unanswerable rows; `abstain_recall`, the fraction of unanswerable rows with the abstain
    text; `abstain_f1`; and `has_answer/exact_match` and `has_answer/f1` over answerable rows.

    If `cite` is set, the numbers at the end of an answer are removed before it is scored. Logs `cite_precision`, the
    fraction of cited passages that belong to gold documents, and `cite_recall`, the fraction of gold passages in the
    row that are cited.

    Args:
        decoding: How answers are generated (default: greedy decoding).
        abstain: The answer to unanswerable questions; None if all questions have answers.
        long: Whether answers are full sentences, which are also scored and ranked by `rougeL`.
        cite: Whether answers end with the numbers of the passages that support them.
        rouge_words: Words that ROUGE compares, as in `GenerationEvaluation`.
        extra_metrics: Further metrics of torchmetrics. They are updated with the answers and the correct answers of the
            rows that have a correct answer.
    """

    monitor = ("f1", "max")
    of_retrieval = retrieval_names()

    def __init__(
        self,
        decoding: Decoding | None = None,
        abstain: str | None = None,
        long: bool = False,
        cite: bool = False,
        rouge_words: RougeWords = "ascii",
        extra_metrics: Sequence[Metric] = (),
    ) -> None:
        super().__init__()
        if abstain is not None and not content_words(abstain):
            raise ValueError(f"abstain must be a text that contains words, or null, got {abstain!r}")
        self.decoding, self.abstain, self.cite = decoding or Decoding(), abstain, cite
        self.answer_names = (*ANSWER_SCORES, *([ROUGE] if long else []))
        self.rouge = Rouge([ROUGE] if long else [], letters=rouge_words)
        self.ranking_score = ROUGE if long else "f1"
        abstention_names = () if abstain is None else (ABSTAINED, *ABSTENTION_SCORES)
        citation_names = CITATION_SCORES if cite else ()
        self.means = (*self.answer_names, "empty", *PASSAGE_SCORES, *abstention_names, *citation_names)
        self.rows = TextRows((*self.means, *retrieval_names(), FOUND, SEARCHED))
        abstain_f1 = () if abstain is None else ("abstain_f1",)
        names = ("generated", *self.means, *abstain_f1, *retrieval_names())
        self.extra = ExtraTextMetrics(extra_metrics, {"loss", *names})
        self.logged = (*names, *self.extra.names)

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """A backbone that can generate text."""
        return (generates(self.decoding.num_beams),)

    def reset(self) -> None:
        """Resets the metrics."""
        self.rows.reset()

    @torch.no_grad()
    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Generates answers. The details of a record are the question and the passages."""
        records = []
        for (text, cited), example in zip(self._generate(lm, batch), require_examples(batch), strict=True):
            details = self._question_details(example, cited)
            records.append({"prediction": text, "scores": None, "details": details})
        return records

    def _generate(self, lm: PromptedLM, batch: Batch) -> list[Answer]:
        with self.decoding.drawing(batch.row_ids[0]):
            ids = lm.generate(batch, **self.decoding.options)
        texts = self.decoding.texts(lm.backbone.codec, ids)
        return [split_citations(text) for text in texts] if self.cite else [(text, []) for text in texts]

    def _question_details(self, example: Example, cited: Sequence[int]) -> dict[str, Any]:
        details = describe_question(example)
        if self.cite:
            details["cited"] = list(cited)
        return details

    @torch.no_grad()
    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Generates and scores answers."""
        examples = require_examples(batch)
        table, records, texts = [], [], []
        for (text, cited), example in zip(self._generate(lm, batch), examples, strict=True):
            scores = self.score(text, cited, example)
            table.append([scores[name] for name in self.rows.columns])
            records.append(self._record(text, cited, example, scores))
            pair = {"prediction": text, "references": list(self.correct_answers(example))}
            texts.append(pair if self.extra.names else {})
        self.rows.update(batch.row_ids, table, texts)
        return records

    def _record(self, text: str, cited: Sequence[int], example: Example, scores: Scores) -> dict[str, Any]:
        names = (*self.answer_names, *PASSAGE_SCORES, *([] if self.abstain is None else [ABSTAINED]))
        answers = self.correct_answers(example)
        return {
            "prediction": text,
            "target": example.target,
            "scores": {name: scores[name] for name in names if not math.isnan(scores[name])},
            "details": {**self._question_details(example, cited), **describe_answers(example, answers)},
        }

    def correct_answers(self, example: Example) -> tuple[str, ...]:
        """Returns the correct answers of a row; none if it is unanswerable."""
        if self.abstain is None:
            return get_references(example)
        return tuple(text for text in example.references if not same_answer(text, self.abstain))

    def score(self, text: str, cited: Sequence[int], example: Example) -> Scores:
        """Returns all scores of an answer by name; NaN for scores that are not defined for its row.

        Args:
            text: The answer.
            cited: The numbers of the passages that it cites.
            example: Its row.
        """
        references = self.correct_answers(example)
        passages = [passage.text for passage in example.passages]
        abstained = self.abstain is not None and same_answer(text, self.abstain)
        scores = self._score_answer(text, references, abstained)
        can_answer = float(contain_answer(passages, references)) if passages and references else NAN
        return {
            **scores,
            "empty": float(not text.strip()),
            "grounded": NAN if abstained else grounded_fraction(text, passages),
            "answerable": can_answer,
            **_abstention_scores(scores, bool(references), abstained),
            **_citation_scores(cited, example),
            **search_scores(example.found, example.gold, example.searched),
        }

    def _score_answer(self, text: str, references: Sequence[str], abstained: bool) -> Scores:
        if abstained or not references:
            return dict.fromkeys(self.answer_names, float(abstained and not references))
        return {**answer_scores(text, references), **self.rouge(text, references)}

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        rows = self.rows.compute()
        names = (*self.means, *names_to_report(rows.columns[FOUND], rows.columns[SEARCHED]))
        metrics = {"generated": float(len(rows)), **compute_means(rows, names, with_intervals=self.stage == "test")}
        if {"abstain_precision", "abstain_recall"} <= set(metrics):
            metrics["abstain_f1"] = _f1(metrics["abstain_precision"], metrics["abstain_recall"])
        results = {name: torch.tensor(value, device=self.rows.device) for name, value in metrics.items()}
        answered = [row for row in rows.texts if row.get("references")]
        if answered:
            predictions = [row["prediction"] for row in answered]
            results |= self.extra.compute(predictions, [row["references"] for row in answered])
        return results

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return self.extra.modes.get(name) or super().mode_of(name)


def describe_question(example: Example) -> dict[str, Any]:
    """Returns the question and the passages of a row, as they are saved in a record."""
    return {
        "question": example.fields.get("question"),
        "passages": [dict(vars(passage)) for passage in example.passages],
        "found": list(example.found),
    }


def describe_answers(example: Example, references: Sequence[str]) -> dict[str, Any]:
    """Returns the correct answers and gold documents of a row, as they are saved in a record."""
    return {"references": list(references), "gold": list(example.gold)}


def _abstention_scores(scores: Scores, has_answer: bool, abstained: bool) -> Scores:
    return {
        ABSTAINED: float(abstained),
        "abstain_precision": float(not has_answer) if abstained else NAN,
        "abstain_recall": NAN if has_answer else float(abstained),
        "has_answer/exact_match": scores["exact_match"] if has_answer else NAN,
        "has_answer/f1": scores["f1"] if has_answer else NAN,
    }


def _citation_scores(cited: Sequence[int], example: Example) -> Scores:
    passages = enumerate(example.passages, start=1)
    gold = {number for number, passage in passages if passage.document in example.gold}
    correct = len(gold & set(cited))
    return {
        "cite_precision": correct / len(set(cited)) if cited and example.gold else NAN,
        "cite_recall": correct / len(gold) if gold else NAN,
    }


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
