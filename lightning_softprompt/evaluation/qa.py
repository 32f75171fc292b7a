"""Metrics of answers to questions: of the answer, of what it rests on, and of what was found for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement, generates
from lightning_softprompt.core.types import Batch, Example
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.generation import examples_of
from lightning_softprompt.evaluation.metrics.answers import (
    OF_ANSWERS,
    answer_measures,
    content_words,
    grounded,
    holds_answer,
    same_answer,
    uncited,
)
from lightning_softprompt.evaluation.metrics.retrieval import (
    FOUND,
    SEARCHED,
    names_to_report,
    retrieval_names,
    search_measures,
)
from lightning_softprompt.evaluation.metrics.text import Rouge, RougeWords
from lightning_softprompt.evaluation.metrics.text_rows import TextRows
from lightning_softprompt.evaluation.metrics.text_scorer import means_of, references_of

NAN = float("nan")
ROUGE = "rougeL"
OF_PASSAGES = ("grounded", "answerable")
ABSTAINED = "abstained"
OF_ABSTENTION = ("abstain_precision", "abstain_recall", "has_answer/exact_match", "has_answer/f1")
OF_CITING = ("cite_precision", "cite_recall")
Said = tuple[str, list[int]]  # an answer, and the passages that it names
Measures = dict[str, float]


@final
class QaEvaluation(Evaluation):
    """Metrics of answers to questions.

    Logs `exact_match`, `precision`, `recall` and `f1` of words, and `contains`, the share of answers that hold a right
    one, all by the reference that fits best, caseless, without marks and English articles; `empty`, the share of empty
    answers; `generated`, how many rows there were. Where rows show passages, also `grounded`, the share of an answer's
    words that stand in them, and `answerable`, the share of rows whose passages hold a right answer. Where rows know
    what was found and what should have been, `hit@k`, `recall@k`, `precision@k` and `ndcg@k` for k of 1, 5 and 10 as
    far as the search went, and `mrr`. In a test, `<metric>_low` and `<metric>_high` are the ends of 95 % intervals over
    rows.

    With an abstain text, rows without references have no answer. An answer to one is right if it is that text, and has
    nothing right otherwise; that text is nothing right where there is an answer, whatever words they share (Rajpurkar
    et al. 2018, 1806.03822). Logs `abstained`, the share of answers that are it; `abstain_precision`, the share of
    those that stand where there is no answer; `abstain_recall`, the share of rows without an answer that have it;
    `abstain_f1`; and `has_answer/exact_match` and `has_answer/f1` of the other rows.

    With `cite`, the numbers at an answer's end are taken off before all else. Logs `cite_precision`, the share of them
    that are passages of gold documents, and `cite_recall`, the share of such passages that are named where shown.

    Args:
        decoding: How answers are generated; None takes the default, greedy.
        abstain: What is said where there is no answer; None where every question has one.
        long: Whether answers are sentences: they are scored by `rougeL` too, which also ranks them.
        cite: Whether answers end with the numbers of the passages that they rest on.
        rouge_words: Which letters make words of ROUGE, as in `GenerationEvaluation`.
    """

    monitor = ("f1", "max")

    def __init__(
        self,
        decoding: Decoding | None = None,
        abstain: str | None = None,
        long: bool = False,
        cite: bool = False,
        rouge_words: RougeWords = "ascii",
    ) -> None:
        super().__init__()
        if abstain is not None and not content_words(abstain):
            raise ValueError(f"abstain must be a text with words, or None, got {abstain!r}")
        self.decoding, self.abstain, self.cite = decoding or Decoding(), abstain, cite
        self.of_answers = (*OF_ANSWERS, *([ROUGE] if long else []))
        self.rouge = Rouge([ROUGE] if long else [], letters=rouge_words)
        self.ranks = ROUGE if long else "f1"
        of_abstention = () if abstain is None else (ABSTAINED, *OF_ABSTENTION)
        of_citing = OF_CITING if cite else ()
        self.means = (*self.of_answers, "empty", *OF_PASSAGES, *of_abstention, *of_citing)
        self.rows = TextRows((*self.means, *retrieval_names(), FOUND, SEARCHED))
        of_both = () if abstain is None else ("abstain_f1",)
        self.logged = ("generated", *self.means, *of_both, *retrieval_names())

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """A backbone that generates."""
        return (generates(self.decoding.num_beams),)

    def reset(self) -> None:
        """Forgets the pass."""
        self.rows.reset()

    @torch.no_grad()
    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """The answers, with their questions and the passages that were shown."""
        rows = zip(self._said(lm, batch), examples_of(batch), strict=True)
        return [{"prediction": said[0], "scores": None, "details": self._asked(of, said[1])} for said, of in rows]

    def _said(self, lm: PromptedLM, batch: Batch) -> list[Said]:
        with self.decoding.drawing(batch.row_ids[0]):
            ids = lm.generate(batch, **self.decoding.options)
        texts = self.decoding.texts(lm.backbone.codec, ids)
        return [uncited(text) for text in texts] if self.cite else [(text, []) for text in texts]

    def _asked(self, example: Example, cited: Sequence[int]) -> dict[str, Any]:
        return {**asked_of(example), **({"cited": list(cited)} if self.cite else {})}

    @torch.no_grad()
    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Generates and scores answers."""
        examples = examples_of(batch)
        rows = list(zip(self._said(lm, batch), examples, strict=True))
        measured = [self.measures(*said, example) for said, example in rows]
        table = [[of[name] for name in self.rows.columns] for of in measured]
        self.rows.update(batch.row_ids, table, [{}] * len(rows))
        return [self._record(*said, example, of) for (said, example), of in zip(rows, measured, strict=True)]

    def _record(self, text: str, cited: Sequence[int], example: Example, measured: Measures) -> dict[str, Any]:
        of_record = (*self.of_answers, *OF_PASSAGES, *([] if self.abstain is None else [ABSTAINED]))
        return {
            "prediction": text,
            "target": example.target,
            "scores": {name: measured[name] for name in of_record if not math.isnan(measured[name])},
            "details": {**self._asked(example, cited), **right_of(example, self.right(example))},
        }

    def right(self, example: Example) -> tuple[str, ...]:
        """The right answers to a row; none where abstaining is what is right."""
        if self.abstain is None:
            return references_of(example)
        return tuple(text for text in example.references if not same_answer(text, self.abstain))

    def measures(self, text: str, cited: Sequence[int], example: Example) -> Measures:
        """Those of an answer beside its row, by the names of the columns; not a number where it has none.

        Args:
            text: The answer.
            cited: The numbers of the passages that it names.
            example: Its row.
        """
        right, shown = self.right(example), [passage.text for passage in example.passages]
        abstained = self.abstain is not None and same_answer(text, self.abstain)
        of_answer = self._of_answer(text, right, abstained)
        return {
            **of_answer,
            "empty": float(not text.strip()),
            "grounded": NAN if abstained else grounded(text, shown),
            "answerable": float(holds_answer(shown, right)) if shown and right else NAN,
            **_of_abstention(of_answer, bool(right), abstained),
            **_of_citing(cited, example),
            **search_measures(example.found, example.gold, example.searched),
        }

    def _of_answer(self, text: str, right: Sequence[str], abstained: bool) -> Measures:
        if abstained or not right:
            return dict.fromkeys(self.of_answers, float(abstained and not right))
        return {**answer_measures(text, right), **self.rouge(text, right)}

    def compute(self) -> dict[str, Tensor]:
        """The metrics of the pass."""
        rows = self.rows.compute()
        names = (*self.means, *names_to_report(rows.columns[FOUND], rows.columns[SEARCHED]))
        metrics = {"generated": float(len(rows)), **means_of(rows, names, self.stage == "test")}
        if {"abstain_precision", "abstain_recall"} <= set(metrics):
            metrics["abstain_f1"] = _f1(metrics["abstain_precision"], metrics["abstain_recall"])
        return {name: torch.tensor(value, device=self.rows.device) for name, value in metrics.items()}


def asked_of(example: Example) -> dict[str, Any]:
    """What a question was and what was shown for it, as a record keeps it."""
    return {
        "question": example.fields.get("question"),
        "passages": [dict(vars(passage)) for passage in example.passages],
        "found": list(example.found),
    }


def right_of(example: Example, references: Sequence[str]) -> dict[str, Any]:
    """What would have been right to say and to find, as a record keeps it."""
    return {"references": list(references), "gold": list(example.gold)}


def _of_abstention(of_answer: Measures, has_answer: bool, abstained: bool) -> Measures:
    return {
        ABSTAINED: float(abstained),
        "abstain_precision": float(not has_answer) if abstained else NAN,
        "abstain_recall": NAN if has_answer else float(abstained),
        "has_answer/exact_match": of_answer["exact_match"] if has_answer else NAN,
        "has_answer/f1": of_answer["f1"] if has_answer else NAN,
    }


def _of_citing(cited: Sequence[int], example: Example) -> Measures:
    gold = {number for number, passage in enumerate(example.passages, start=1) if passage.document in example.gold}
    right = len(gold & set(cited))
    return {
        "cite_precision": right / len(set(cited)) if cited and example.gold else NAN,
        "cite_recall": right / len(gold) if gold else NAN,
    }


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
