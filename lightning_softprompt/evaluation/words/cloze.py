"""Questions about terms in a text: which term was removed?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Answer, Encoded, Piece, Text
from lightning_softprompt.evaluation.metrics.intervals import bootstrap_ratio

SPACE = " "  # between the text before a term and the term
RIGHT_TOKENS = 16  # of the text after a term that a decoder predicts together with it
ACCURACY = "cloze@1"
EXACT = {"end": "cloze_greedy", "inside": "cloze_joint"}  # by the location of the answer
SHARE = "cloze_tokens"
Result = dict[str, Any]


@dataclass(frozen=True)
class ClozeQuestion:
    """A text from which a term was removed.

    Args:
        left: The text before the term, without the space between them.
        term: The term.
        right: The text after it.
        distractors: Other terms, of which none is correct.
        document: Number of the document in its source.
    """

    left: str
    term: str
    right: str
    distractors: tuple[str, ...]
    document: int = 0

    @property
    def candidates(self) -> tuple[str, ...]:
        """The term and the distractors."""
        return (self.term, *self.distractors)


@final
class ClozeTest:
    """Cloze questions that a test asks in addition to its rows.

    A decoder scores each candidate by the probability of the candidate and the next 16 tokens after the text before it.
    An encoder scores it by the product of the probabilities of its tokens, all of which are masked.

    Args:
        draw: Returns the questions and the number of rows of the test. It is called before the first batch of a test.
        template: The template of the rows. Nothing follows its target.
        max_tokens: Maximum tokens of a row. The text before a term is truncated to fit.
    """

    def __init__(
        self, draw: Callable[[], tuple[Sequence[ClozeQuestion], int]], template: Template, max_tokens: int
    ) -> None:
        self.draw, self.template, self.max_tokens = draw, template, max_tokens

    def __deepcopy__(self, memo: Any) -> ClozeTest:
        """Returns the same object, since the evaluations of all stages share the questions."""
        return self

    @cached_property
    def _drawn(self) -> tuple[Sequence[ClozeQuestion], int]:
        return self.draw()

    def assign(self, rows: Sequence[int] | None) -> dict[int, list[ClozeQuestion]]:
        """Distributes the questions evenly over the rows of a test, so that processes share them.

        Args:
            rows: The rows that are scored; None for all.

        Returns:
            The questions of each row that has some.
        """
        questions, num_rows = self._drawn
        scored = range(num_rows) if rows is None else rows
        assigned: dict[int, list[ClozeQuestion]] = {}
        for number, question in enumerate(questions):
            row = scored[number * len(scored) // len(questions)]
            assigned.setdefault(row, []).append(question)
        return assigned

    def ask(self, lm: PromptedLM, question: ClozeQuestion, device: torch.device) -> Result:
        """Returns the term that a model selects, and how many tokens of the correct term it predicts."""
        codec: Codec = lm.backbone.codec
        rows = [self.encode(codec, question, candidate) for candidate in question.candidates]
        batch = codec.collate(rows).to(device)
        first = batch.only([0])
        with torch.no_grad():
            nats = lm.cross_entropy(batch).double().sum(1)
            num_tokens = len(codec.ids(SPACE + question.term))
            predicted = lm(first)[0, :num_tokens].argmax(-1)
        num_correct = int((predicted == first.targets[0, :num_tokens]).sum())
        chosen = int(nats.argmin())
        return {
            "term": question.term,
            "chosen": question.candidates[chosen],
            "correct": chosen == 0,
            "exact": num_correct == num_tokens,
            "share": num_correct / num_tokens,
            "document": question.document,
        }

    def encode(self, codec: Codec, question: ClozeQuestion, candidate: str) -> Encoded:
        """Encodes a question with a candidate as its target."""
        *before, target = self.template.pieces({})
        assert isinstance(target, Answer)
        pieces: list[Piece] = [*before, Text(target.glue + question.left, truncatable=True), Answer(SPACE)]
        if codec.answer_location == "inside":
            pieces.append(Text(question.right, truncatable=True))
            return codec.encode(pieces, candidate, self.max_tokens, truncation_side="start")
        num_tokens = len(codec.ids(SPACE + candidate)) + RIGHT_TOKENS
        text = candidate + question.right
        return codec.encode(pieces, text, self.max_tokens, truncation_side="start", target_tokens=num_tokens)


def check_family(codec: Codec) -> None:
    """Checks that a backbone can answer questions.

    Raises:
        ValueError: If it is an encoder-decoder.
    """
    if codec.answer_location not in EXACT:
        raise ValueError("data.cloze requires a decoder or an encoder, and this backbone is an encoder-decoder")


def summarize_results(results: Sequence[Result], location: str, with_intervals: bool) -> Mapping[str, float]:
    """Returns the metrics of questions.

    Args:
        results: The results of `ClozeTest.ask`.
        location: Where the family of the backbone has its answers.
        with_intervals: Whether to add the 95 % interval of the accuracy over documents.
    """
    count = len(results)
    metrics = {
        ACCURACY: sum(result["correct"] for result in results) / count,
        EXACT[location]: sum(result["exact"] for result in results) / count,
        "cloze_questions": float(count),
    }
    if location == "inside":
        metrics[SHARE] = sum(result["share"] for result in results) / count
    if with_intervals:
        values = [float(result["correct"]) for result in results]
        low, high = bootstrap_documents(values, [result["document"] for result in results])
        metrics |= {f"{ACCURACY}_low": low, f"{ACCURACY}_high": high}
    return metrics


def bootstrap_documents(values: Sequence[float], documents: Sequence[int]) -> tuple[float, float]:
    """Returns the 95 % interval of a mean over questions, which resamples their documents."""
    sums: dict[int, float] = {}
    counts: dict[int, float] = {}
    for value, document in zip(values, documents, strict=True):
        sums[document] = sums.get(document, 0.0) + value
        counts[document] = counts.get(document, 0.0) + 1.0
    return bootstrap_ratio(list(sums.values()), list(counts.values()))
