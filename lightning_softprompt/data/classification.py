"""Rows of text with a class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np

from lightning_softprompt.core.template import TARGET
from lightning_softprompt.core.types import Classes, Example, Label
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.labels import (
    NUMERAL,
    ClassNumbers,
    GivenLabels,
    is_missing,
    is_written_list,
    trimmed,
    words_by_name,
)
from lightning_softprompt.data.readers.sources import first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation


@final
class ClassificationDataModule(SoftPromptDataModule):
    """Text, or several texts, with one class.

    Args:
        template: How a row is written.
        labels: The classes in order, each with the word, or the words, that stand for it (the verbalizer), or a list of
            names that stand for themselves; None takes the names that occur in the training rows, sorted, and in
            `validate`, `test` and `predict` those of the checkpoint or prompt.
        label: The column that holds the class, as a name or as its number in `labels`.
        shots: Uses so many training rows of each class only, drawn by the seed.
        balanced: Draws training rows so that all classes come up equally often.
        demonstrations: So many training rows of each class, drawn by the seed, are handed to methods that show some.
        common: Arguments of every data module.
    """

    classes_option = "labels"

    def __init__(
        self,
        template: str = "{soft}{text}\nLabel: {target}",
        labels: GivenLabels | None = None,
        label: str = "label",
        shots: int | None = None,
        balanced: bool = False,
        demonstrations: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(template=template, **common)
        if shots is not None and shots < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        if demonstrations < 0:
            raise ValueError(f"demonstrations must be at least 0, got {demonstrations}")
        self._labels = labels
        self.label = label
        self.shots = shots
        self.balanced = balanced
        self.demonstrations = demonstrations

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """For each class the words that stand for it, as the config has them."""
        labels = self._names() if self._labels is None else self._labels
        words = words_by_name(labels, "labels")
        if len(words) < 2 or not all(words.values()):
            raise ValueError(f"classification needs at least two classes, each with a word, got {words}")
        return words

    def _names(self) -> list[str]:
        """The classes of the training rows, sorted. Rows without one are refused, or skipped, later."""
        rows = self.rows("train")
        if not any(self.label in row for row in rows):
            raise ValueError(
                f"no column {self.label!r} in the training rows, which have {first_columns(rows[0])}: set data.label "
                "to the column that holds the class"
            )
        values = (row.get(self.label) for row in rows)
        single = (value for value in values if not isinstance(value, list | tuple | Mapping))
        names = sorted({trimmed(str(v)) for v in single if not is_missing(v) and not is_written_list(v)})
        floats = [name for name in names if name.endswith(".0") and NUMERAL.fullmatch(name)]
        if same := [name for name in floats if name.removesuffix(".0") in names]:
            raise ValueError(
                f"the training rows have both labels {same[0].removesuffix('.0')!r} and {same[0]!r}, which are one "
                "number: write it in one way, or name the classes in data.labels"
            )
        return names

    @cached_property
    def _numbers(self) -> ClassNumbers:
        return ClassNumbers(list(self.words))

    @property
    def classes(self) -> Classes:
        """How the classes are spoken, with the template's spaces before the words."""
        glue = self.template.glue
        words = {name: [glue + w for w in words] for name, words in self.words.items()}
        return Classes(words, self.template.text, self._demonstrations())

    def _demonstrations(self) -> tuple[dict[str, str], ...]:
        """Training rows, those of all classes mixed."""
        if not self.demonstrations:
            return ()
        examples = self.split("train").examples
        drawn = self._drawn(examples, self.demonstrations, "demonstrations")
        mixed = np.random.default_rng(self.seed).permutation(drawn).tolist()
        return tuple({**examples[i].fields, TARGET: examples[i].target} for i in mixed)

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy, F1 and their like."""
        return ClassificationEvaluation(tuple(self.words))

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """The class's first word is the target; rows that are not labelled take any, which nothing reads."""
        label = self._class(row) if labelled else None
        return Example(self.text(row), list(self.words.values())[label or 0][0], label)

    def _class(self, row: Mapping[str, Any]) -> int:
        if self.label not in row:
            raise ValueError(f"no column {self.label!r}; the row has {first_columns(row)}: set label to another")
        value = row[self.label]
        if is_missing(value):
            raise ValueError(f"column {self.label!r} has no label, got {value!r}; labels are {self._numbers.accepted}")
        if (number := self._numbers.find(value)) is None:
            raise ValueError(f"unknown label {value!r}; labels are {self._numbers.accepted}")
        return number

    def chosen(self, examples: Sequence[Example]) -> Sequence[int]:
        """All rows, or `shots` of each class."""
        return range(len(examples)) if self.shots is None else self._drawn(examples, self.shots, "shots")

    def _drawn(self, examples: Sequence[Example], count: int, what: str) -> list[int]:
        by_class: dict[Label | None, list[int]] = defaultdict(list)
        for i in np.random.default_rng(self.seed).permutation(len(examples)).tolist():
            by_class[examples[i].label].append(i)
        short = {name: len(by_class[c]) for c, name in enumerate(self.words) if len(by_class[c]) < count}
        if short:
            raise ValueError(f"{what}={count} rows of each class are wanted, but there are only {short}")
        return sorted(i for rows in by_class.values() for i in rows[:count])

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """The inverse of each class's frequency, where classes are to be balanced."""
        if not self.balanced:
            return None
        counts = Counter(example.label for example in examples)
        return [1 / counts[example.label] for example in examples]
