"""Metrics of torchmetrics that the user adds to an evaluation."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn
from torchmetrics import Metric

WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@final
class ExtraMetrics(nn.Module):
    """Metrics of torchmetrics, which are updated with the same arguments.

    Each metric is first updated with example arguments, so that metrics which do not fit are refused before training.

    Args:
        metrics: The metrics. They are cloned.
        example: Arguments of `update`, as the evaluation passes them.
        reserved: Names that the evaluation uses for other metrics.

    Raises:
        ValueError: If a metric cannot be computed from the example, a result is not a scalar, or a name is not unique.
    """

    def __init__(self, metrics: Sequence[Metric], example: Sequence[Any], reserved: Collection[str]) -> None:
        super().__init__()
        self.metrics = nn.ModuleList(metric.clone() for metric in metrics)
        self.modes = try_metrics(metrics, example, reserved)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all results."""
        return tuple(self.modes)

    def update(self, *arguments: Any) -> None:
        """Updates each metric."""
        for metric in self.metrics:
            cast(Metric, metric).update(*arguments)

    def compute(self) -> dict[str, Tensor]:
        """Returns the results by name.

        Raises:
            ValueError: If a result is not a scalar.
        """
        results: dict[str, Tensor] = {}
        for metric in self.metrics:
            results |= compute_scalars(cast(Metric, metric))
        return results

    def reset(self) -> None:
        """Resets each metric."""
        for metric in self.metrics:
            cast(Metric, metric).reset()


def snake_case(name: str) -> str:
    """Returns the name of a class in snake case.

    >>> snake_case("MulticlassAUROC"), snake_case("BLEUScore"), snake_case("MulticlassF1Score")
    ('multiclass_auroc', 'bleu_score', 'multiclass_f1_score')
    """
    return WORD_STARTS.sub("_", name).lower()


def try_metrics(
    metrics: Sequence[Metric], example: Sequence[Any], reserved: Collection[str]
) -> dict[str, Literal["min", "max"]]:
    """Computes metrics from an example, and returns whether lower or higher values are better, by name.

    Args:
        metrics: The metrics, which are not changed.
        example: Arguments of `update`.
        reserved: Names of other metrics.

    Raises:
        ValueError: If a metric cannot be computed from the example, a result is not a scalar, or a name is not unique.
    """
    modes: dict[str, Literal["min", "max"]] = {}
    for metric in metrics:
        for name in _compute_example(metric, example):
            if name in reserved or name in modes:
                raise ValueError(f"extra_metrics: there is another metric {name!r}; remove one of the two")
            modes[name] = "min" if metric.higher_is_better is False else "max"
    return modes


def _compute_example(metric: Metric, example: Sequence[Any]) -> dict[str, Tensor]:
    trial = metric.clone()
    trial.reset()
    try:
        trial.update(*example)
        return compute_scalars(trial)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(f"extra_metrics: {type(metric).__name__} cannot be used for this task: {error}") from error


def compute_scalars(metric: Metric) -> dict[str, Tensor]:
    """Computes a metric and returns its results by name."""
    result = metric.compute()
    named = result if isinstance(result, Mapping) else {snake_case(type(metric).__name__): result}
    scalars: dict[str, Tensor] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor | int | float) or torch.as_tensor(value).numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} must be a scalar, got {shape}; if the metric has the option average, set it to macro or micro"
            )
        scalars[str(name)] = torch.as_tensor(value).float().squeeze()
    return scalars
