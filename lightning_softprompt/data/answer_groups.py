"""Tokenized questions with several answers each, which are adjacent in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.core.types import Batch, Encoded, Example, PreferenceExample
from lightning_softprompt.data.prepared import Collate, PreparedRows
from lightning_softprompt.data.readers.sources import Origin
from lightning_softprompt.data.splits.row_encoder import RowEncoder
from lightning_softprompt.data.token_cache import content_key


@dataclass(frozen=True)
class AnswerEncoder(RowEncoder):
    """Encodes each answer of a question. All answers follow the same tokens of the question.

    A question is truncated so far that its longest answer fits.
    """

    def encode(self, example: Example) -> Encoded:
        """Encodes the question with its target.

        Raises:
            ValueError: If an answer has more than `max_target_tokens` tokens, or does not fit into `max_tokens`.
        """
        (answers,) = answers_of([example])
        lengths = [self._count(answer) for answer in answers]
        longest = max(lengths)
        if self.max_target_tokens is not None and longest > self.max_target_tokens:
            text = answers[lengths.index(longest)]
            raise ValueError(
                f"the answer {text[:40]!r} has {longest} tokens, more than data.max_answer_tokens="
                f"{self.max_target_tokens}; increase it, or set data.on_bad_row to skip"
            )
        reserving = RowEncoder(
            self.codec, self.template, self.max_tokens, self.truncation_side, self.append_eos, longest
        )
        return reserving.encode(example)

    def _count(self, answer: str) -> int:
        """Counts the tokens of an answer, with the token that ends it."""
        ids = self.codec.ids(self.template.glue + answer)
        return len(ids) + (len(self.codec.stop) if self.append_eos else 0)

    def encode_others(
        self, name: str, examples: Sequence[Example], origins: Sequence[Origin], use_cache: bool
    ) -> list[tuple[Encoded, ...]]:
        """Encodes the answers of each question in addition to its target.

        Args:
            name: The split, for the log.
            examples: The questions.
            origins: Where each question comes from.
            use_cache: Whether to use the cache on disk.
        """
        others, places = [], []
        for example, origin in zip(examples, origins, strict=True):
            for other in rotate_answers(example):
                others.append(other)
                places.append(origin)
        encoded = iter(self.encode_split(f"{name} (other answers)", others, places, use_cache)) if others else iter(())
        return [tuple(next(encoded) for _ in answers[1:]) for answers in answers_of(examples)]

    def _cache_key(self, examples: Sequence[Example]) -> str:
        """Hashes everything that determines the tokens, which includes the other answers of a question."""
        return content_key([super()._cache_key(examples), answers_of(examples)])


def answers_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """Returns the answers of each question, the target first."""
    return [getattr(example, "answers", (example.target,)) for example in examples]


def rotate_answers(example: Example) -> list[Example]:
    """Returns the question once for each answer in addition to its target, with that answer as the target."""
    ((target, *rejected),) = answers_of([example])
    rotated = []
    for number, answer in enumerate(rejected):
        others = (target, *rejected[:number], *rejected[number + 1 :])
        rotated.append(replace(example, target=answer, rejected=others))  # type: ignore[call-arg]
    return rotated


@dataclass(frozen=True)
class GroupedRows(PreparedRows):
    """A tokenized split whose items are questions with all of their answers. Its items are the input of `GroupCollate`.

    Args:
        others: The tokens of each question with its other answers; `encoded` has those of the targets.
    """

    others: Sequence[tuple[Encoded, ...]]

    def __getitem__(self, index: int) -> tuple[int, Any, Example]:
        return index, (self.encoded[index], *self.others[index]), self.examples[index]

    @property
    def lengths(self) -> Sequence[int]:
        """Number of input and target tokens of all answers of each question."""
        groups = zip(self.encoded, self.others, strict=True)
        return [sum(len(row.ids) + len(row.targets) for row in (first, *rest)) for first, rest in groups]


@dataclass(frozen=True)
class GroupCollate(Collate):
    """Collates items of `GroupedRows` into a batch, in which the answers of a question are adjacent."""

    def __call__(self, items: Sequence[tuple[int, Any, Example]]) -> Batch:
        """Returns the batch. Each answer is a row; `groups`, `grades` and `margins` describe how rows are related."""
        rows: list[Encoded] = []
        row_ids, examples, groups = [], [], []
        for number, (row_id, answers, example) in enumerate(items):
            rows += answers
            row_ids += [row_id] * len(answers)
            examples += [example] * len(answers)
            groups += [number] * len(answers)
        batch = self.codec.collate(rows, row_ids=row_ids, examples=examples)
        questions = [example for _, _, example in items if isinstance(example, PreferenceExample)]
        is_compared = len(groups) > len(items)
        return replace(
            batch,
            groups=torch.tensor(groups) if is_compared else None,
            grades=_grades(questions),
            margins=_margins(questions),
        )


def _grades(questions: Sequence[PreferenceExample]) -> Tensor | None:
    if not all(question.grades for question in questions):
        return None
    return torch.tensor([grade for question in questions for grade in question.grades], dtype=torch.float32)


def _margins(questions: Sequence[PreferenceExample]) -> Tensor | None:
    if all(question.margin is None for question in questions):
        return None
    margins: list[float] = []
    for question in questions:
        margins += [question.margin or 0.0, *[0.0] * len(question.rejected)]
    return torch.tensor(margins)
