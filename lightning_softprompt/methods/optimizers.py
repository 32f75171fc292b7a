"""Optimizers and schedules made from their options, and tried before a training begins."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

log = logging.getLogger(__name__)
T = TypeVar("T")
Groups = Sequence[dict[str, Any]]
TRIED = 10_000  # most steps of a schedule that are tried
MONITOR = "val/loss"  # what a schedule by plateaus watches if it does not say


def optimizer_over(make: Callable[[Any], Optimizer], groups: Groups) -> Optimizer:
    """An optimizer over parameter groups.

    Raises:
        ValueError: If its options are refused by the optimizer, or are not finite.
    """
    optimizer = _made("optimizer", make, groups)
    for group in optimizer.param_groups:
        _check_numbers(group)
    return optimizer


def _check_numbers(group: Mapping[str, Any]) -> None:
    numbers = {name: value for name, value in group.items() if isinstance(value, float)}
    for name, value in numbers.items():
        if not math.isfinite(value) or (name == "lr" and value < 0):
            raise ValueError(f"--model.optimizer: {name} must be a finite number from 0 on, got {value}")


def _made(option: str, make: Callable[[Any], T], argument: Any) -> T:
    try:
        return make(argument)
    except Exception as error:  # PyTorch raises what fits the mistake
        raise ValueError(f"--model.{option} cannot be made with its options: {error}") from error


def with_schedule(optimizer: Optimizer, make: Callable[[Any], Any]) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """An optimizer and its schedule in Lightning's form.

    A schedule advances once a step. One that watches a metric advances with each validation, by `lower_on_plateau`.

    Raises:
        ValueError: If the schedule cannot be made.
    """
    schedule = _made("scheduler", make, optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        monitor = getattr(schedule, "monitor", MONITOR)
        return [optimizer], [{"scheduler": schedule, "interval": "epoch", "monitor": monitor, "strict": False}]
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def monitor_of(make_optimizer: Callable[[Any], Optimizer], make_schedule: Callable[[Any], Any] | None) -> str | None:
    """The metric that a schedule watches, if it watches one, asked before anything is loaded.

    Raises:
        ValueError: If the optimizer cannot be made.
    """
    twin = _twin(make_optimizer, [{}])
    try:
        schedule = None if make_schedule is None else make_schedule(twin)
    except (
        Exception
    ):  # it may want as many groups of parameters as the method has; it is made again when they are known
        return None
    return getattr(schedule, "monitor", MONITOR) if isinstance(schedule, ReduceLROnPlateau) else None


def _twin(make: Callable[[Any], Optimizer], groups: Groups) -> Optimizer:
    """An optimizer with as many groups and the same rates, over parameters that nobody uses."""
    rates = [{name: group[name] for name in ("initial_lr", "lr") if name in group} for group in groups]
    starts = [{"lr": rate.get("initial_lr", rate["lr"])} if rate else {} for rate in rates]
    return optimizer_over(make, [{**start, "params": [nn.Parameter(torch.zeros(2, 2))]} for start in starts])


def try_schedule(
    make_optimizer: Callable[[Any], Optimizer],
    make_schedule: Callable[[Any], Any] | None,
    groups: Groups,
    steps: float | None,
) -> None:
    """Advances a schedule as a training will, by one step where its length is not known.

    Args:
        make_optimizer: Makes the optimizer.
        make_schedule: Makes the schedule, if there is one.
        groups: The groups of parameters that are trained.
        steps: How many steps the training has, infinite where its end is open; None where that is not known.

    Raises:
        ValueError: Naming the step at which it fails.
    """
    if make_schedule is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch misses the optimizer's steps
        schedule = _made("scheduler", make_schedule, _twin(make_optimizer, groups))
        if isinstance(schedule, ReduceLROnPlateau):
            return
        count = None if steps is None or math.isinf(steps) else int(steps)
        for step in range(1, min(count or 1, TRIED) + 1):
            _advance(schedule, f"at step {step}" if count is None else f"at step {step} of {count}")
    if count is not None:
        _warn_of_length(schedule, count)


def _advance(schedule: Any, place: str) -> None:
    try:
        schedule.step()
    except Exception as error:  # PyTorch raises what fits the mistake
        raise ValueError(f"--model.scheduler fails {place}: {error}; its options do not fit the training") from error
    for rate in schedule.get_last_lr():
        if not 0 <= float(rate) < math.inf:
            raise ValueError(f"--model.scheduler: the learning rate would be {float(rate)} {place}")


def _warn_of_length(schedule: Any, count: int) -> None:
    """Tells of a schedule that is made for another number of steps; a training does not fail for that."""
    total, half = getattr(schedule, "total_steps", None), getattr(schedule, "T_max", None)
    if total is not None and total > count:
        log.warning("--model.scheduler has total_steps=%s, but training ends at step %s, on the way", total, count)
    if half is not None and half < count:
        log.warning("--model.scheduler: the learning rate rises after step T_max=%s; training has %s", half, count)


def steps_of(trainer: Trainer) -> float | None:
    """How many steps a training has, asked when its rows are there; None where the Trainer cannot say."""
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation differs between epochs
        return None


def lower_on_plateau(trainer: Trainer, metrics: Mapping[str, Any]) -> None:
    """Advances the schedules that watch a metric, after a validation of a training and before its checkpoint.

    Raises:
        ValueError: If the validation does not give the metric.
    """
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return
    for config in _plateaus(trainer):
        if config.monitor not in metrics:
            raise ValueError(f"--model.scheduler.monitor is {config.monitor!r}, but validation gives {sorted(metrics)}")
        config.scheduler.step(float(metrics[config.monitor]))


def _plateaus(trainer: Trainer) -> Iterable[Any]:
    return (config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau)


def advance(schedule: Any) -> None:
    """Advances a schedule after a step; one that watches a metric does so after validations alone."""
    if not isinstance(schedule, ReduceLROnPlateau):
        schedule.step()
