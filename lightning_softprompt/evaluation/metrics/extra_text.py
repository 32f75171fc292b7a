"""Text metrics of torchmetrics that the user adds to an evaluation of generated text."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, final, get_args, get_origin, get_type_hints

from torch import Tensor
from torchmetrics import Metric

from lightning_softprompt.evaluation.metrics.extra import compute_scalars, try_metrics

log = logging.getLogger(__name__)
References = Sequence[Sequence[str]]
EXAMPLES = {  # predictions and references, some of them empty or without a common word
    True: (["a small dog barks", ""], [["a small dog barks", "the dog barks"], ["it rains today"]]),
    False: (["a small dog barks", ""], ["a small dog barks", "it rains today"]),
}


@final
class ExtraTextMetrics:
    """Metrics of torchmetrics that compare predicted texts with reference texts.

    They are computed from all texts of all processes at once, so corpus metrics such as BLEU are exact. A metric whose
    `update` accepts several references per row gets all of them, another one the first of each row.

    Args:
        metrics: The metrics. They are cloned.
        reserved: Names that the evaluation uses for other metrics.

    Raises:
        ValueError: If a metric does not compare texts, a result is not a scalar, or a name is not unique.
    """

    def __init__(self, metrics: Sequence[Metric], reserved: Collection[str]) -> None:
        self.metrics = [metric.clone() for metric in metrics]
        self.modes: dict[str, Literal["min", "max"]] = {}
        for metric in self.metrics:
            metric.sync_on_compute = False  # every process has the texts of all of them
            example = EXAMPLES[takes_several_references(metric)]
            self.modes |= try_metrics([metric], example, {*reserved, *self.modes})
        self._has_warned = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all results."""
        return tuple(self.modes)

    def compute(self, predictions: Sequence[str], references: References) -> dict[str, Tensor]:
        """Computes all metrics.

        Args:
            predictions: The predicted texts.
            references: The references of each.
        """
        results: dict[str, Tensor] = {}
        for metric in self.metrics:
            metric.reset()
            if takes_several_references(metric):
                metric.update(list(predictions), [list(texts) for texts in references])
            else:
                self._warn_of_references(metric, references)
                metric.update(list(predictions), [texts[0] for texts in references])
            results |= compute_scalars(metric)
        return results

    def _warn_of_references(self, metric: Metric, references: References) -> None:
        if not self._has_warned and any(len(texts) > 1 for texts in references):
            self._has_warned = True
            log.warning("%s compares a text with one reference: the first of each row", type(metric).__name__)


def takes_several_references(metric: Metric) -> bool:
    """Whether `update` of a metric accepts several references per row, according to the type of its second argument.

    A metric without types is expected to accept several.
    """
    update = type(metric).update
    arguments = list(inspect.signature(update).parameters)
    hints = get_type_hints(update)
    hint = hints.get(arguments[2], Any) if len(arguments) > 2 else Any
    return _accepts_texts(hint, depth=2)


def _accepts_texts(hint: Any, depth: int) -> bool:
    """Whether a type is text in `depth` nested sequences."""
    if hint is Any:
        return True
    if hint is str:
        return depth == 0
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return depth > 0 and any(_accepts_texts(argument, depth - 1) for argument in arguments)
    is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
    return not is_mapping and any(_accepts_texts(argument, depth) for argument in arguments)
