"""Questions and answers from documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.evaluation.metrics.answers import answer_scores
from lightning_softprompt.synthetic.writers.base import Columns, Request, Row, Source, Step, Writer


@dataclass(frozen=True)
class QuestionAnswer(Writer):
    """Writes a question about a document and its answer, then answers the question again as a check.

    The columns of a row are `document`, `question`, `answer` and `second_answer`. `scores.round_trip_f1` is the word F1
    of the second answer, and `scores.in_document` is 1 if the document contains the answer; `Score` filters by them.

    Args:
        document: Column of the document.
        question_instruction: Asks for a question; `{document}` inserts the document.
        answer_instruction: Asks for the answer; `{question}` inserts the question.
        check_instruction: Asks for the answer again, in other words.
    """

    document: str = "document"
    question_instruction: str = "{document}\n\nWrite one short question that this text answers."
    answer_instruction: str = "{document}\n\nQuestion: {question}\nAnswer with a few words of the text."
    check_instruction: str = "Read this text.\n\n{document}\n\nNow answer briefly: {question}"
    requires_source = True
    main_column = "question"

    @property
    def steps(self) -> Sequence[Step]:
        """The question and its two answers."""
        return [
            Step("question", self.question_instruction),
            Step("answer", self.answer_instruction),
            Step("second_answer", self.check_instruction),
        ]

    def request(self, number: int, generator: random.Random, source: Source, earlier: Sequence[Row]) -> Request:
        """Returns the document of a row; source rows are used in turn."""
        index = number % len(source)
        document = source.text(index, self.document)
        return Request({"document": document}, source.origins[index], {"document": document})

    def finish(self, columns: Columns, request: Request, earlier: Sequence[Row]) -> dict[str, Any]:
        """Returns the row with the agreement of its two answers."""
        row = super().finish(columns, request, earlier)
        answer = columns["answer"]
        is_in_document = bool(answer) and answer.rstrip(".").casefold() in columns["document"].casefold()
        scores = {
            "round_trip_f1": answer_scores(columns["second_answer"], [answer])["f1"],
            "in_document": float(is_in_document),
        }
        return {**row, "scores": scores}
