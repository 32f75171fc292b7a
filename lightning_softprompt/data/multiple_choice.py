"""Multiple choice with options that differ from row to row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any, final

from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.core.types import Classes, Example, OptionExample
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import Split
from lightning_softprompt.data.readers.sources import Origin, first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.extended import UserMetrics
from lightning_softprompt.evaluation.options import OptionEvaluation

LISTING = "options"  # the template column that lists the options


@final
class MultipleChoiceDataModule(SoftPromptDataModule):
    r"""Selects one of several options, which differ from row to row. Rows may have different numbers of options.

    The readout `RankedOptions` scores the text of each option after the row. For options that are the same in every
    row, use `ClassificationDataModule`. To train on rows such as
    `{"question": "What barks?", "options": ["a cat", "a dog"], "answer": 1}`:

        softprompt fit --model PromptTuning --data MultipleChoiceDataModule --data.path FOLDER

    Args:
        template: Text of a row: `{column}` inserts a column, `{soft}` marks soft tokens, `{target}` marks the option
            that is scored. `{options}` inserts a list of all options, one per line as `A. text`.
        options: Column with a list of options, or the columns of the options; empty ones are left out.
        answer: Column of the correct option: its index, its letter (A is the first one), or its text.
        first_index: Index of the first option, if answers are indices.
        max_option_tokens: Tokens of max_tokens reserved for an option.
        extra_metrics: Further evaluations of your own, one or several.
        common: Arguments of every data module.

    Raises:
        ValueError: If max_option_tokens is not between 0 and max_tokens, or extra_metrics contains metrics of
            torchmetrics.
    """

    def __init__(
        self,
        template: str = "{soft}{question}\nAnswer: {target}",
        options: str | list[str] = "options",
        answer: str = "answer",
        first_index: int = 0,
        max_option_tokens: int = 64,
        extra_metrics: Evaluation | list[Evaluation] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=template, **common)
        if not 0 < max_option_tokens < self.max_tokens:
            raise ValueError(
                f"max_option_tokens must be between 0 and max_tokens={self.max_tokens}, got {max_option_tokens}"
            )
        self.option_columns = (options,) if isinstance(options, str) else tuple(options)
        self.answer, self.first_index = answer, first_index
        self.max_target_tokens = max_option_tokens
        self.user_metrics = UserMetrics.from_option(extra_metrics)
        if self.user_metrics.metrics:
            raise ValueError(
                "extra_metrics of MultipleChoiceDataModule requires evaluations: metrics of torchmetrics require the "
                "same classes in every row"
            )

    @property
    def classes(self) -> Classes:
        """No classes with fixed names: the options are in each row."""
        return Classes({}, self.template.text)

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy, and the accuracy of chance."""
        return self.user_metrics.extend(OptionEvaluation())

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How rows are written, with the columns of the options."""
        return {"": replace(super().row_formats[""], options=self.option_columns)}

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns of the template and of the options."""
        return (*(name for name in self.template.columns if name != LISTING), *self.option_columns[:1])

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row to text with its options."""
        options = read_options(row, self.option_columns)
        self._check_lengths(options)
        fields = self.text(row, {LISTING: list_options(options)})
        if not labelled:
            return OptionExample(fields, options[0], options=options)
        if self.answer not in row:
            raise ValueError(f"no column {self.answer!r}; the row has {first_columns(row)}: set data.answer")
        correct = find_option(row[self.answer], options, self.first_index, self.answer)
        return OptionExample(fields, options[correct], correct, (options[correct],), options=options)

    def _check_lengths(self, options: Sequence[str]) -> None:
        for option in options:
            count = len(self.codec.ids(self.template.glue + option))
            if count > (self.max_target_tokens or 0):
                raise ValueError(
                    f"the option {option[:40]!r} has {count} tokens, more than the {self.max_target_tokens} that are "
                    "reserved for an option; increase data.max_option_tokens"
                )

    def convert_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Converts rows, and logs how many options they have."""
        examples, origins = super().convert_rows(name)
        counts = [len(example.options) for example in examples if isinstance(example, OptionExample)]
        if counts:
            chance = sum(1 / count for count in counts) / len(counts)
            self.log_once(
                f"{name}: {len(counts):,} rows with {min(counts)} to {max(counts)} options; the accuracy of chance is "
                f"{chance:.3f}"
            )
        return examples, origins


def read_options(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the options of a row.

    Args:
        row: The row.
        columns: A column with a list of options, or the columns of the options.

    Raises:
        ValueError: If a column is missing or is not text, or the options are fewer than two or not distinct.
    """
    if len(columns) == 1:
        if columns[0] not in row:
            raise ValueError(f"no column {columns[0]!r}; the row has {first_columns(row)}: set data.options")
        values = row[columns[0]]
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"column {columns[0]!r} must be a list of options, got {values!r}; if each option has its own column, "
                "set data.options to the list of columns"
            )
    else:
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(f"no column {missing[0]!r}; the row has {first_columns(row)}: set data.options")
        values = [row[column] for column in columns if row[column] not in (None, "")]
    wrong = [value for value in values if not isinstance(value, str) or not value.strip()]
    if wrong:
        raise ValueError(f"options must be non-empty texts, got {wrong[0]!r}")
    options = tuple(value.strip() for value in values)
    if len(options) < 2 or len(set(options)) < len(options):
        raise ValueError(f"a row requires at least two different options, got {list(options)}")
    return options


def list_options(options: Sequence[str]) -> str:
    """Returns the options as text, one per line, with letters, or numbers after Z.

    >>> print(list_options(["a cat", "a dog"]))
    A. a cat
    B. a dog
    """
    lines = []
    for number, option in enumerate(options):
        name = ascii_uppercase[number] if number < len(ascii_uppercase) else str(number + 1)
        lines.append(f"{name}. {option}")
    return "\n".join(lines)


def find_option(answer: Any, options: Sequence[str], first_index: int, column: str) -> int:
    """Returns the index of the correct option.

    Args:
        answer: Its index, letter or text.
        options: The options of the row.
        first_index: The index of the first option.
        column: Name of the column, for messages.

    Raises:
        ValueError: If the answer is none of the options.
    """
    found: int | None = None
    if isinstance(answer, str):
        text = answer.strip()
        letters = ascii_uppercase[: len(options)]
        if text in options:
            found = options.index(text)
        elif text.upper() in letters and len(text) == 1:
            found = letters.index(text.upper())
        elif text.isdecimal():
            found = int(text) - first_index
    elif isinstance(answer, int) and not isinstance(answer, bool):
        found = answer - first_index
    if found is None or not 0 <= found < len(options):
        raise ValueError(
            f"column {column!r} must be the index (from {first_index}), the letter or the text of one of the "
            f"{len(options)} options {list(options)}, got {answer!r}"
        )
    return found
