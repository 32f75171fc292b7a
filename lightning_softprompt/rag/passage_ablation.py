"""Rows of a question-answering test without some of their passages, or with passages in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, final

from lightning_softprompt.backbones.tokenization.token_names import NamedPiece, name_tokens
from lightning_softprompt.core.types import Encoded, Text
from lightning_softprompt.rag.passage_selection import QaExample
from lightning_softprompt.rag.qa_datamodule import RagQaDataModule

QUESTION, PASSAGE = "question", "passage {}"  # names of the tokens of the question, and of a passage by its number


@final
class AblationRow:
    """A question whose passages can be left out, reordered, or combined with another question.

    Args:
        data: The data module.
        index: The row in the test split.

    Raises:
        ValueError: If the row has no passages, or its passages are not selected again.
    """

    def __init__(self, data: RagQaDataModule, index: int) -> None:
        self.data = data
        self.example = cast(QaExample, data.split("test").examples[index])
        rendered = data.renderer.render(self.example, data.selector.select(self.example))
        if rendered.example.passages != self.example.passages:
            raise ValueError("the row has other passages than before; the index or the tokenizer has changed")
        if not self.example.passages:
            raise ValueError("the row has no passages")
        self.titles = rendered.titles

    @property
    def num_passages(self) -> int:
        """Number of passages."""
        return len(self.example.passages)

    @property
    def question(self) -> str:
        """The question."""
        return self.example.fields[self.data.question]

    def read_answer(self, record: Mapping[str, Any]) -> str:
        """Returns the answer of the record of a test, as a target: the word of a choice, or text with its citations."""
        prediction = str(record["prediction"])
        if self.data.words is not None:
            return self.data.words[prediction]
        cited = "".join(f" [{number}]" for number in record.get("cited", ()))
        return prediction + cited

    def encode(
        self, arrangement: Sequence[int | None], answer: str, question: str | None = None
    ) -> tuple[Encoded, list[str]]:
        """Returns the tokens of the row, and the name of each of them.

        Args:
            arrangement: The index of the passage at each position; None leaves the position empty, without a change of
                the numbers of the other passages.
            answer: The target.
            question: Another question (default: that of the row).
        """
        data = self.data
        pieces = self._pieces(arrangement, self.question if question is None else question)
        plain_pieces = [named.piece for named in pieces]
        row = data.codec.encode(plain_pieces, answer, None, data.append_eos, "end", data.max_target_tokens)
        return row, name_tokens(data.codec, pieces, row)

    def _pieces(self, arrangement: Sequence[int | None], question: str) -> list[NamedPiece]:
        """Returns the pieces of the row. Consecutive texts are tokenized as one, so each passage is a text."""
        data = self.data
        passages = self._passages_by_column(arrangement)
        fields = {**self.example.fields, data.question: question}
        pieces: list[NamedPiece] = []
        for piece, column in zip(data.template.pieces(fields), data.template.piece_columns, strict=True):
            if column in passages:
                pieces += passages[column]
            elif column == data.question:
                pieces.append(NamedPiece(piece, QUESTION))
            else:
                pieces.append(NamedPiece(piece))
        return pieces

    def _passages_by_column(self, arrangement: Sequence[int | None]) -> dict[str | None, list[NamedPiece]]:
        template = self.data.passage
        columns: dict[str | None, list[NamedPiece]] = {column: [] for column in self.data.passage_columns}
        for number, index in enumerate(arrangement, start=1):
            if index is None:
                continue
            passage = self.example.passages[index], self.titles[index]
            segments = template.render_segments(number, *passage)
            spans = template.segment_spans(number, *passage)
            name = PASSAGE.format(index + 1)
            for column, segment, template_spans in zip(template.columns_of(number), segments, spans, strict=True):
                text = Text(segment, truncatable=True, template_spans=template_spans)
                columns[column].append(NamedPiece(text, name))
        return columns
