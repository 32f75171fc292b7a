"""Preferences: questions with answers of which one is better than the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.tokenization.codec import TruncationSide
from lightning_softprompt.core.types import Example, PreferenceExample
from lightning_softprompt.data.answer_groups import AnswerEncoder, GroupCollate, GroupedRows
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import PreparedRows, Split
from lightning_softprompt.data.readers.sources import first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.preferences.liked import LikedEvaluation
from lightning_softprompt.evaluation.preferences.pairs import PreferenceEvaluation


@final
class PreferenceDataModule(SoftPromptDataModule):
    r"""Answers to the same question, of which one is preferred, or which are ranked.

    Objectives such as `RewardModeling` and `DPO` compare the answers of a question. All answers follow the same tokens
    of the question, and end with the token that stops generation. A batch contains whole questions: `batch_size` counts
    questions. For rows such as `{"prompt": "What barks?", "chosen": "A dog.", "rejected": "A cat."}`:

        softprompt fit --model PromptTuning --model.objective DPO --data PreferenceDataModule --data.path FOLDER

    Args:
        template: Text of a row: `{column}` inserts a column, `{soft}` marks soft tokens, `{target}` marks the answer.
        chosen: Column of the preferred answer.
        rejected: Column of the rejected answer.
        answers: Column with a list of two or more answers, instead of chosen and rejected.
        ranks: Column with the rank of each of the answers; the best rank is the lowest, and ranks can be equal. By
            default, the answers are listed from the best to the worst.
        margin: Column with a number by which the preferred answer is better; null if there is none.
        liked: Column with true or false for data with a single answer to each question, whose column is `chosen`; for
            the objective `KTO`.
        max_answer_tokens: Maximum tokens of an answer; a row with a longer answer is a bad row, because a truncated
            answer would not end. By default, an answer must fit into max_tokens.
        truncation_side: Which part of a column to remove from a question that is too long. The default keeps the last
            turns of a dialogue.
        decoding: How a trained prompt generates answers (default: greedy decoding of up to 128 tokens).
        common: Arguments of every data module.

    Raises:
        ValueError: If max_answer_tokens is not between 0 and max_tokens, or ranks, a margin or liked are set for data
            that cannot have them.
    """

    append_eos = True
    compares_answers = True
    can_augment = False

    def __init__(
        self,
        template: str = "{soft}{prompt}\n\n{target}",
        chosen: str = "chosen",
        rejected: str = "rejected",
        answers: str | None = None,
        ranks: str | None = None,
        margin: str | None = None,
        liked: str | None = None,
        max_answer_tokens: int | None = None,
        truncation_side: TruncationSide = "start",
        decoding: Decoding | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=template, truncation_side=truncation_side, **common)
        if max_answer_tokens is not None and not 0 < max_answer_tokens < self.max_tokens:
            raise ValueError(
                f"max_answer_tokens must be between 0 and max_tokens={self.max_tokens}, got {max_answer_tokens}"
            )
        if ranks is not None and answers is None:
            raise ValueError(f"ranks={ranks!r} requires a column with a list of answers; set answers")
        if margin is not None and answers is not None:
            raise ValueError(f"margin={margin!r} is for pairs of chosen and rejected answers, not for ranked answers")
        if liked is not None and (answers is not None or margin is not None):
            raise ValueError(f"liked={liked!r} is for single answers, which have neither ranks nor margins")
        self.chosen, self.rejected, self.liked = chosen, rejected, liked
        self.answers, self.rank_column, self.margin = answers, ranks, margin
        self.max_target_tokens = max_answer_tokens
        decoding = decoding or Decoding()
        self.decoding = replace(decoding, max_new_tokens=decoding.max_new_tokens or 128)

    @property
    def evaluation(self) -> Evaluation:
        """Whether preferred or liked answers have higher scores."""
        return PreferenceEvaluation() if self.liked is None else LikedEvaluation()

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How rows are written; generation reserves as many tokens as it may generate."""
        assert self.decoding is not None
        return {"": replace(super().row_formats[""], max_target_tokens=self.decoding.max_new_tokens)}

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns of the template and of the answers."""
        if self.answers is not None:
            return (*self.template.columns, self.answers)
        rejected = (self.rejected,) if self.liked is None else ()
        return (*self.template.columns, self.chosen, *rejected)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row to text. Rows to predict have two or more answers without ranks."""
        fields = self.text(row)
        if self.liked is not None:
            answer = read_answer(row, self.chosen, "chosen")
            return PreferenceExample(fields, answer, grades=(read_liked(row, self.liked),) if labelled else ())
        if self.answers is None:
            texts = [read_answer(row, self.chosen, "chosen"), read_answer(row, self.rejected, "rejected")]
            grades, margin = [1.0, 0.0], read_margin(row, self.margin)
        else:
            texts, grades, margin = self._read_ranked(row, labelled), [], None
            if labelled:
                grades = read_grades(row, self.rank_column, len(texts))
                order = sorted(range(len(texts)), key=lambda number: -grades[number])
                texts = [texts[number] for number in order]
                grades = [grades[number] for number in order]
        check_different(texts)
        return PreferenceExample(
            fields, texts[0], rejected=tuple(texts[1:]), grades=tuple(grades), margin=margin if labelled else None
        )

    def _read_ranked(self, row: Mapping[str, Any], labelled: bool) -> list[str]:
        assert self.answers is not None
        values = _value(row, self.answers, "answers")
        if not isinstance(values, list | tuple) or len(values) < 2:
            raise ValueError(f"column {self.answers!r} must be a list of two or more answers, got {values!r}")
        return [read_answer({self.answers: value}, self.answers, "answers") for value in values]

    @property
    def _encoder(self) -> AnswerEncoder:
        return AnswerEncoder(
            self.codec, self.template, self.max_tokens, self.truncation_side, self.append_eos, self.max_target_tokens
        )

    def prepare_split(self, name: Split) -> PreparedRows:
        """Reads and encodes the questions of a split, with all of their answers."""
        rows = super().prepare_split(name)
        use_cache = self.cache and name != "predict"
        others = self._encoder.encode_others(name, rows.examples, rows.origins, use_cache)
        return GroupedRows(rows.examples, rows.encoded, rows.origins, others)

    @property
    def collate(self) -> GroupCollate:
        """Collates items of a split into a `Batch`."""
        return GroupCollate(self.codec)


def _value(row: Mapping[str, Any], column: str, option: str) -> Any:
    if column not in row:
        raise ValueError(f"no column {column!r}; the row has {first_columns(row)}: set data.{option}")
    return row[column]


def read_answer(row: Mapping[str, Any], column: str, option: str) -> str:
    """Returns an answer of a row.

    Args:
        row: The row.
        column: The column of the answer.
        option: The option that names the column, for messages.

    Raises:
        ValueError: If the column is missing, not text or empty.
    """
    value = _value(row, column, option)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"the answer in column {column!r} is empty")
    return value.strip()


def read_liked(row: Mapping[str, Any], column: str) -> float:
    """Returns 1 for an answer that is liked, and 0 for another.

    Raises:
        ValueError: If the column is missing, or is not true, false, 1 or 0.
    """
    value = _value(row, column, "liked")
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError(f"column {column!r} must be true or false, got {value!r}")
    return float(value)


def read_margin(row: Mapping[str, Any], column: str | None) -> float | None:
    """Returns the margin of a pair; None if the data have no margins.

    Raises:
        ValueError: If the margin is missing or not a finite number of at least 0.
    """
    if column is None:
        return None
    value = _value(row, column, "margin")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"the margin in column {column!r} must be a finite number of at least 0, got {value!r}")
    return float(value)


def read_grades(row: Mapping[str, Any], column: str | None, count: int) -> list[float]:
    """Returns the grade of each answer, the negative rank.

    Args:
        row: The row.
        column: The column with the ranks; None if answers are listed from the best to the worst.
        count: Number of answers.

    Raises:
        ValueError: If the ranks are not numbers, one for each answer, of which at least two differ.
    """
    if column is None:
        return [-float(number) for number in range(count)]
    ranks = _value(row, column, "ranks")
    are_numbers = isinstance(ranks, list | tuple) and all(
        isinstance(rank, int | float) and not isinstance(rank, bool) and math.isfinite(rank) for rank in ranks
    )
    if not are_numbers or len(ranks) != count:
        raise ValueError(f"column {column!r} must be a list of {count} ranks, one for each answer, got {ranks!r}")
    if len(set(ranks)) < 2:
        raise ValueError(f"the ranks of a question must differ, got {ranks!r} in column {column!r}")
    return [-float(rank) for rank in ranks]


def check_different(answers: Sequence[str]) -> None:
    """Checks that the answers of a question differ.

    Raises:
        ValueError: If two are equal.
    """
    for number, answer in enumerate(answers):
        if answer in answers[:number]:
            raise ValueError(f"two answers of a question are equal: {answer[:60]!r}")
