"""Text classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
from torchmetrics import Metric

from lightning_softprompt.core.template import TARGET
from lightning_softprompt.core.types import Classes, Example
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.labels import ClassNumbers, GivenLabels, words_by_name
from lightning_softprompt.data.readers.class_column import (
    DEFAULT_LABEL,
    ClassColumn,
    inverse_frequencies,
    sample_per_class,
)
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.extended import UserMetrics


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
        self._column = ClassColumn(label, self.template.columns)
        self.shots = shots
        self.balanced = balanced
        self.demonstrations = demonstrations
        self.user_metrics = UserMetrics.from_option(extra_metrics)

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """The label words of each class, as in the config."""
        labels = self._column.infer_names(self.rows("train")) if self._labels is None else self._labels
        words = words_by_name(labels, "labels")
        if len(words) < 2 or not all(words.values()):
            raise ValueError(f"classification requires at least two classes, each with a label word, got {words}")
        return words

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
        sample = sample_per_class(examples, list(self.words), self.demonstrations, "demonstrations", self.seed)
        shuffled = np.random.default_rng(self.seed).permutation(sample).tolist()
        return tuple({**examples[i].fields, TARGET: examples[i].target} for i in shuffled)

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy, F1 and other classification metrics."""
        default = ClassificationEvaluation(tuple(self.words), self.user_metrics.metrics)
        return self.user_metrics.extend(default)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row. The target is the first label word; unlabelled rows get that of the first class as filler."""
        label = self._column.number(row, self._numbers) if labelled else None
        words = list(self.words.values())[label or 0]
        return Example(self.text(row), words[0], label)

    def select_rows(self, examples: Sequence[Example]) -> Sequence[int]:
        """Returns all rows, or `shots` rows of each class."""
        if self.shots is None:
            return range(len(examples))
        return sample_per_class(examples, list(self.words), self.shots, "shots", self.seed)

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """Returns the inverse frequency of each row's class if `balanced` is set."""
        return inverse_frequencies(examples) if self.balanced else None
