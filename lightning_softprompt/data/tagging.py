"""Token classification: a tag for each word of a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from string import Formatter
from typing import Any, cast, final

from torchmetrics import Metric

from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.core.template import TARGET
from lightning_softprompt.core.types import Classes, Example, Spans
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.labels import ClassNumbers, GivenWord, as_text, compose_accents, is_missing, trim
from lightning_softprompt.data.prepared import Split
from lightning_softprompt.data.readers.sources import first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.extended import UserMetrics
from lightning_softprompt.evaluation.tagging import TaggingEvaluation


@final
class TaggingDataModule(SoftPromptDataModule):
    r"""Tags each word, as in named entity recognition or part-of-speech tagging. Requires the readout `TokenHead`.

    To train on rows such as `{"tokens": ["Ann", "left", "Rome"], "tags": ["B-PER", "O", "B-LOC"]}` in
    `FOLDER/train.jsonl` and `FOLDER/validation.jsonl`:

        softprompt fit --backbone.name all-minilm-l6-v2 --model PTuningV2 --model.length 16 --model.readout TokenHead \
            --data TaggingDataModule --data.path FOLDER --data.tags '[O, B-PER, I-PER, B-LOC, I-LOC]'

    Words are joined by spaces, and each word is tagged at its first token. Words whose tokens are all truncated are
    not tagged; their number is logged. Tags of the form B-TYPE, I-TYPE and O are also scored by entity.

    Args:
        template: Text of a row. It must contain the column of words once, before `{target}`, which has no text here (an
            encoder has a mask token there). Default: only the words.
        tags: The tags in order (default: the sorted tags in the training rows; in `validate`, `test` and `predict` the
            tags of the checkpoint or prompt).
        tokens_column: Column of the words.
        tags_column: Column of the tags, as names or as indices into `tags`.
        extra_metrics: Further metrics: one or several metrics of torchmetrics, which are updated with the tag
            probabilities and the tags of all words, or evaluations.
        common: Arguments of every data module.

    Raises:
        ValueError: If the template does not contain the words once and before `{target}`.
    """

    classes_option = "tags"
    can_augment = False  # words have classes

    def __init__(
        self,
        template: str | None = None,
        tags: list[GivenWord] | None = None,
        tokens_column: str = "tokens",
        tags_column: str = "tags",
        extra_metrics: Metric | Evaluation | list[Metric | Evaluation] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=template or f"{{soft}}{{{tokens_column}}}{{{TARGET}}}", **common)
        names = [name for _, name, _, _ in Formatter().parse(self.template.text)]
        if names.count(tokens_column) != 1 or names.index(tokens_column) > names.index(TARGET):
            raise ValueError(
                f"template {self.template.text!r} must contain the words {{{tokens_column}}} once, before {{{TARGET}}}"
            )
        self._tags = tags
        self.tokens_column = tokens_column
        self.tags_column = tags_column
        self.user_metrics = UserMetrics.from_option(extra_metrics)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tags in order."""
        names = self._infer_names() if self._tags is None else [as_text(tag, "tags") for tag in self._tags]
        if len(set(map(compose_accents, names))) < max(2, len(names)):
            raise ValueError(f"tagging requires at least two different tags, got {names}; set data.tags to all tags")
        return tuple(names)

    @cached_property
    def _tag_numbers(self) -> ClassNumbers:
        return ClassNumbers(self.names)

    def _infer_names(self) -> list[str]:
        rows = self.rows("train")
        if not any(self.tags_column in row for row in rows):
            raise ValueError(
                f"no column {self.tags_column!r} in the training rows, which have {first_columns(rows[0])}: set "
                "data.tags_column to the column of the tags"
            )
        columns = [row.get(self.tags_column) for row in rows]
        tags = [tag for column in columns if isinstance(column, list) for tag in column]
        if any(type(tag) is int for tag in tags):
            raise ValueError("tags of the training rows are numbers; set data.tags to the names of the tags in order")
        return sorted({trim(tag) for tag in tags if isinstance(tag, str) and not is_missing(tag)})

    @property
    def classes(self) -> Classes:
        """The tags, which have no label words."""
        return Classes(dict.fromkeys(self.names, ()), self.template.text)

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How rows are written, with the column of words."""
        return {"": replace(super().row_formats[""], words=self.tokens_column)}

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy and entity F1."""
        return self.user_metrics.extend(TaggingEvaluation(self.names, self.user_metrics.metrics))

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Joins the words to one text; the target is empty."""
        words = self._read_list(row, "tokens_column", str)
        if not words or not all(words):
            raise ValueError(f"column {self.tokens_column!r} must contain non-empty words, got {words}")
        text = self.text({**row, self.tokens_column: " ".join(words)})
        tags = self._numbers(row, words) if labelled else None
        return Example(text, "", tags, words={self.tokens_column: spans(words)})

    def _read_list(self, row: Mapping[str, Any], option: str, *kinds: type) -> list[Any]:
        column = getattr(self, option)
        if column not in row:
            raise ValueError(f"no column {column!r}; the row has {first_columns(row)}: set data.{option}")
        values = row[column]
        if isinstance(values, list) and all(type(value) in kinds for value in values):
            return values
        raise ValueError(
            f"column {column!r} must be a list of {' or '.join(kind.__name__ for kind in kinds)}, got {values!r}"
        )

    def _numbers(self, row: Mapping[str, Any], words: Sequence[str]) -> tuple[int, ...]:
        tags = self._read_list(row, "tags_column", str, int)
        if len(tags) != len(words):
            raise ValueError(f"each word requires one tag, but there are {len(words)} words and {len(tags)} tags")
        numbers = [self._tag_numbers.find(tag) for tag in tags]
        if None in numbers:
            first = numbers.index(None)
            raise ValueError(
                f"unknown tag {tags[first]!r} of {words[first]!r}; tags are {self._tag_numbers.accepted}: set "
                "data.tags to all tags"
            )
        return tuple(number for number in numbers if number is not None)

    def describe_row(self, name: Split, row: int) -> dict[str, Any]:
        """Describes a row; its `target` is the list of tags, or None if they are unknown."""
        label = self.split(name).examples[row].label
        tags = None if label is None else [self.names[tag] for tag in cast("tuple[int, ...]", label)]
        return {**super().describe_row(name, row), "target": tags}


def spans(words: Sequence[str]) -> Spans:
    """Returns start and end of each word in the text of words joined by spaces.

    >>> spans(["We", "are", "1 1/2"])
    ((0, 2), (3, 6), (7, 12))
    """
    starts = accumulate((len(word) + 1 for word in words), initial=0)
    return tuple((start, start + len(word)) for word, start in zip(words, starts, strict=False))
