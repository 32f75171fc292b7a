"""Text classification."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
from torchmetrics import Metric

from lightning_softprompt.core.template import TARGET
from lightning_softprompt.core.types import Classes, Example, Label
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.labels import (
    NUMERAL,
    ClassNumbers,
    GivenLabels,
    is_missing,
    is_written_list,
    trim,
    words_by_name,
)
from lightning_softprompt.data.readers.sources import first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.extended import UserMetrics

log = logging.getLogger(__name__)
DEFAULT_LABEL = "label"
LABEL_COLUMNS = ("class", "category", "intent", "topic", "sentiment", "target")  # read if there is no other label


@final
class ClassificationDataModule(SoftPromptDataModule):
    """Classifies a text, or several texts, into one of two or more classes.

    Args:
        template: Text of a row: `{column}` inserts a column, `{soft}` marks soft tokens, `{target}` marks the label.
        labels: The classes in order, each with its label word or words (verbalizer), or a list of names that are their
            own label words (default: the sorted names in the training rows; in `validate`, `test` and `predict` the
            classes of the checkpoint or prompt).
        label: Column of the class, which contains a name or an index into `labels`. Without such a column, one called
            class, category, intent, topic, sentiment or target is used if it is the only one of these.
        shots: Few-shot: sample N training rows per class (by `seed`).
        balanced: Sample training rows so that all classes are equally frequent.
        demonstrations: Number of training rows per class, sampled by `seed`, for methods that use demonstrations.
        extra_metrics: Further metrics: one or several metrics of torchmetrics, which are updated with class
            probabilities and labels, such as
            `[{class_path: torchmetrics.classification.MulticlassCalibrationError, init_args: {num_classes: 2}}]`, or
            evaluations.
        common: Arguments of every data module.
    """

    classes_option = "labels"

    def __init__(
        self,
        template: str = "{soft}{text}\nLabel: {target}",
        labels: GivenLabels | None = None,
        label: str = DEFAULT_LABEL,
        shots: int | None = None,
        balanced: bool = False,
        demonstrations: int = 0,
        extra_metrics: Metric | Evaluation | list[Metric | Evaluation] | None = None,
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
        self.user_metrics = UserMetrics.from_option(extra_metrics)

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """The label words of each class, as in the config."""
        labels = self._infer_names() if self._labels is None else self._labels
        words = words_by_name(labels, "labels")
        if len(words) < 2 or not all(words.values()):
            raise ValueError(f"classification requires at least two classes, each with a label word, got {words}")
        return words

    def _infer_names(self) -> list[str]:
        """Returns the sorted classes of the training rows. Rows without a class are reported later."""
        rows = self.rows("train")
        if not any(self.label in row for row in rows):
            self._use_other_name(rows[0])
        values = (row.get(self.label) for row in rows)
        scalars = (value for value in values if not isinstance(value, list | tuple | Mapping))
        labels = (value for value in scalars if not is_missing(value) and not is_written_list(value))
        names = sorted({trim(str(label)) for label in labels})
        floats = [name for name in names if name.endswith(".0") and NUMERAL.fullmatch(name)]
        duplicates = [name for name in floats if name.removesuffix(".0") in names]
        if duplicates:
            number = duplicates[0]
            raise ValueError(
                f"the training rows have both labels {number.removesuffix('.0')!r} and {number!r}, which are one "
                "number: use one spelling, or set data.labels"
            )
        return names

    def _use_other_name(self, row: Mapping[str, Any]) -> None:
        """Sets `label` to the only column of a row that has a usual name of a class.

        Raises:
            ValueError: If there is no such column, or several.
        """
        found = [name for name in row if name.strip().lower() in LABEL_COLUMNS and name not in self.template.columns]
        if self.label != DEFAULT_LABEL or len(found) != 1:
            others = [name for name in row if name not in self.template.columns]
            raise ValueError(
                f"no column {self.label!r}; the row has {first_columns(row)}: set data.label to the column of the "
                f"class, such as --data.label {others[0] if others else 'COLUMN'}"
            )
        self.label = found[0]
        log.info("Classes are read from the column %r; data.label sets another one", self.label)

    @cached_property
    def _numbers(self) -> ClassNumbers:
        return ClassNumbers(list(self.words))

    @property
    def classes(self) -> Classes:
        """The classes with their label words. Each word includes the space that the template has before `{target}`."""
        glue = self.template.glue
        words = {name: [glue + word for word in class_words] for name, class_words in self.words.items()}
        return Classes(words, self.template.text, self._demonstrations())

    def _demonstrations(self) -> tuple[dict[str, str], ...]:
        """Samples training rows of each class and shuffles them."""
        if not self.demonstrations:
            return ()
        examples = self.split("train").examples
        sample = self._sample_per_class(examples, self.demonstrations, "demonstrations")
        shuffled = np.random.default_rng(self.seed).permutation(sample).tolist()
        return tuple({**examples[i].fields, TARGET: examples[i].target} for i in shuffled)

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy, F1 and other classification metrics."""
        default = ClassificationEvaluation(tuple(self.words), self.user_metrics.metrics)
        return self.user_metrics.extend(default)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row. The target is the first label word; unlabelled rows get that of the first class as filler."""
        label = self._class(row) if labelled else None
        words = list(self.words.values())[label or 0]
        return Example(self.text(row), words[0], label)

    def _class(self, row: Mapping[str, Any]) -> int:
        if self.label not in row:
            self._use_other_name(row)
        value = row[self.label]
        if is_missing(value):
            raise ValueError(f"column {self.label!r} has no label, got {value!r}; labels are {self._numbers.accepted}")
        number = self._numbers.find(value)
        if number is None:
            raise ValueError(f"unknown label {value!r}; labels are {self._numbers.accepted}")
        return number

    def select_rows(self, examples: Sequence[Example]) -> Sequence[int]:
        """Returns all rows, or `shots` rows of each class."""
        if self.shots is None:
            return range(len(examples))
        return self._sample_per_class(examples, self.shots, "shots")

    def _sample_per_class(self, examples: Sequence[Example], count: int, option: str) -> list[int]:
        """Returns the sorted indices of `count` random rows of each class."""
        by_class: dict[Label | None, list[int]] = defaultdict(list)
        for i in np.random.default_rng(self.seed).permutation(len(examples)).tolist():
            by_class[examples[i].label].append(i)
        sizes = {name: len(by_class[number]) for number, name in enumerate(self.words)}
        too_small = {name: size for name, size in sizes.items() if size < count}
        if too_small:
            raise ValueError(f"{option}={count} rows of each class requested, but there are only {too_small}")
        return sorted(i for rows in by_class.values() for i in rows[:count])

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """Returns the inverse frequency of each row's class if `balanced` is set."""
        if not self.balanced:
            return None
        counts = Counter(example.label for example in examples)
        return [1 / counts[example.label] for example in examples]
