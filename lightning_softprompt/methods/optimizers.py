"""Optimizers and schedules created from their options, and checked before training begins."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_softprompt.methods.schedules import WarmupSchedule

log = logging.getLogger(__name__)
T = TypeVar("T")
Groups = Sequence[dict[str, Any]]
MAX_TRIED_STEPS = 10_000  # of a schedule
MONITOR = "val/loss"  # default monitor of ReduceLROnPlateau
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"}  # of PyTorch's optimizers


@final
@dataclass(frozen=True)
class OptimizerFactory:
    """Creates the optimizer of a training and its schedule.

    Args:
        make_optimizer: Creates the optimizer of parameter groups.
        make_schedule: Creates the schedule of an optimizer; None for that of `warmup_schedule`.
        lr: Learning rate of the parameter groups that set none; None for that of the optimizer.
        warmup_schedule: Schedule for the length of the training; None for constant learning rates.
    """

    make_optimizer: Callable[[Any], Optimizer]
    make_schedule: Callable[[Any], Any] | None = None
    lr: float | None = None
    warmup_schedule: WarmupSchedule | None = None

    def build(self, groups: Groups, steps: float | None, after: Sequence[Callable[[], None]] = ()) -> Any:
        """Creates optimizer and schedule in Lightning's format.

        A schedule advances once per step. `ReduceLROnPlateau` advances at each validation, see
        `step_plateau_schedules`.

        Args:
            groups: Parameter groups.
            steps: Number of training steps; infinite if unbounded, None if unknown.
            after: Functions that are called after each optimizer step.

        Raises:
            ValueError: If the optimizer or the schedule cannot be created.
        """
        optimizer = build_optimizer(self.make_optimizer, self._with_rate(groups))
        for follow in after:
            optimizer.register_step_post_hook(lambda *_, follow=follow: follow())
        schedule = self._build_schedule(optimizer, steps)
        if schedule is None:
            return optimizer
        if isinstance(schedule, ReduceLROnPlateau):
            monitor = getattr(schedule, "monitor", MONITOR)
            return [optimizer], [{"scheduler": schedule, "interval": "epoch", "monitor": monitor, "strict": False}]
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _with_rate(self, groups: Groups) -> Groups:
        """Returns the groups with the learning rate `lr`, except those that set another one."""
        if self.lr is None:
            return groups
        return [{"lr": self.lr, **group} for group in groups]

    def _build_schedule(self, optimizer: Optimizer, steps: float | None) -> Any:
        """Creates the schedule of an optimizer; None for constant learning rates."""
        if self.make_schedule is not None:
            return _construct("scheduler", self.make_schedule, optimizer)
        return None if self.warmup_schedule is None else self.warmup_schedule.build(optimizer, steps)

    def find_monitor(self) -> str | None:
        """Returns the metric that the schedule monitors, if any. It is known before the backbone is loaded.

        Raises:
            ValueError: If the optimizer cannot be created.
        """
        optimizer = _build_placeholder(self.make_optimizer, [{}])
        try:
            schedule = None if self.make_schedule is None else self.make_schedule(optimizer)
        except Exception:  # it may require as many parameter groups as the method has, which are checked later
            return None
        return getattr(schedule, "monitor", MONITOR) if isinstance(schedule, ReduceLROnPlateau) else None

    def try_schedule(self, groups: Groups, steps: float | None) -> None:
        """Runs the schedule for the length of the training, without training, to find errors early.

        Args:
            groups: Parameter groups.
            steps: Number of training steps; infinite if unbounded, None if unknown, which tries one step.

        Raises:
            ValueError: If the schedule fails, naming the step.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that the optimizer takes no steps
            optimizer = _build_placeholder(self.make_optimizer, self._with_rate(groups))
            schedule = self._build_schedule(optimizer, steps)
            if schedule is None or isinstance(schedule, ReduceLROnPlateau):
                return
            count = None if steps is None or math.isinf(steps) else int(steps)
            for step in range(1, min(count or 1, MAX_TRIED_STEPS) + 1):
                position = f"at step {step}" if count is None else f"at step {step} of {count}"
                _try_step(schedule, position)
        if count is not None:
            _warn_about_length(schedule, count)


def build_optimizer(make: Callable[[Any], Optimizer], groups: Groups) -> Optimizer:
    """Creates an optimizer over parameter groups.

    Raises:
        ValueError: If the optimizer refuses its options, or they are not finite.
    """
    optimizer = _construct("optimizer", make, groups)
    for group in optimizer.param_groups:
        _check_numbers(group)
    return optimizer


def _check_numbers(group: Mapping[str, Any]) -> None:
    numbers = {name: value for name, value in group.items() if isinstance(value, float)}
    for name, value in numbers.items():
        if not math.isfinite(value) or (name == "lr" and value < 0):
            raise ValueError(f"--model.optimizer: {name} must be a finite, non-negative number, got {value}")


def _construct(option: str, make: Callable[[Any], T], argument: Any) -> T:
    try:
        return make(argument)
    except Exception as error:  # PyTorch raises many types of errors here
        raise ValueError(f"--model.{option} cannot be created with its options: {error}") from error


def _build_placeholder(make: Callable[[Any], Optimizer], groups: Groups) -> Optimizer:
    """Creates an optimizer with the same groups and learning rates over unused parameters."""
    placeholders = []
    for group in groups:
        placeholder: dict[str, Any] = {"params": [nn.Parameter(torch.zeros(2, 2))]}
        if "lr" in group:
            placeholder["lr"] = group.get("initial_lr", group["lr"])
        placeholders.append(placeholder)
    return build_optimizer(make, placeholders)


def _try_step(schedule: Any, position: str) -> None:
    try:
        schedule.step()
    except Exception as error:  # PyTorch raises many types of errors here
        raise ValueError(
            f"--model.scheduler fails {position}: {error}. Set its options to the length of the training"
        ) from error
    for rate in schedule.get_last_lr():
        if not 0 <= float(rate) < math.inf:
            raise ValueError(f"--model.scheduler: the learning rate would be {float(rate)} {position}")


def _warn_about_length(schedule: Any, count: int) -> None:
    """Warns about a schedule for another number of steps. Training still works."""
    total_steps = getattr(schedule, "total_steps", None)
    half_period = getattr(schedule, "T_max", None)
    if total_steps is not None and total_steps > count:
        log.warning("--model.scheduler has total_steps=%s, but training ends earlier, at step %s", total_steps, count)
    if half_period is not None and half_period < count:
        log.warning(
            "--model.scheduler: the learning rate rises again after step T_max=%s; training has %s steps",
            half_period, count,
        )  # fmt: skip


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a module that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def separate_group(groups: Groups, name: str, parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Returns parameter groups in which some parameters have a group and a learning rate of their own.

    Args:
        groups: The groups, which may contain the parameters.
        name: The name of the new group.
        parameters: The parameters of the new group.
        lr: Its learning rate.
    """
    selected = list(parameters)
    selected_ids = {id(parameter) for parameter in selected}
    separated = []
    for number, group in enumerate(groups):
        rest = [parameter for parameter in group["params"] if id(parameter) not in selected_ids]
        if rest:
            separated.append({"name": "prompt" if not number else str(number), **group, "params": rest})
    return [*separated, {"params": selected, "name": name, "lr": lr}]


def check_trainable(method: nn.Module, groups: Groups) -> None:
    """Checks that there are trainable parameters, in float32 or wider.

    Raises:
        ValueError: If there are none, or they are in half precision.
    """
    dtypes = {name: parameter.dtype for name, parameter in trainable_parameters(method).items()}
    half = {name: dtype for name, dtype in dtypes.items() if dtype.itemsize < torch.float32.itemsize}
    if half:
        dtype = next(iter(half.values()))
        raise ValueError(
            f"{', '.join(half)} would be trained in {dtype} instead of float32, and small updates would be lost. "
            f"Set --trainer.precision to bf16-mixed or 32-true; --backbone.dtype sets the precision of the frozen "
            f"weights"
        )
    if not any(group["params"] for group in groups):
        raise ValueError(f"{type(method).__name__} has nothing to train; use validate, test or predict with it")


def refuse_changed_state(optimizers: Sequence[Optimizer], path: str) -> None:
    """Refuse the state of optimizers that lacks moments, or whose moments do not have the shapes of their parameters.

    Args:
        optimizers: They have loaded the state of a checkpoint.
        path: The checkpoint, for messages.

    Raises:
        ValueError: Naming the state.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, Adam | AdamW) and not optimizer.state:
            raise ValueError(f"{path} cannot be resumed: it was changed, and its optimizer has no state")
        for parameter, state in optimizer.state.items():
            for name in MOMENTS & set(state):
                moment = state[name]
                if moment is not None and getattr(moment, "shape", None) != parameter.shape:
                    raise ValueError(
                        f"{path} cannot be resumed: it was changed, and {name} of its optimizer does not have the "
                        f"shape of the parameter, {list(parameter.shape)}"
                    )


def count_training_steps(trainer: Trainer) -> float | None:
    """Returns the number of training steps once the data is set up; None if the Trainer cannot compute it."""
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:  # if gradient accumulation changes between epochs
        return None


def step_plateau_schedules(trainer: Trainer, metrics: Mapping[str, Any]) -> None:
    """Advances the schedules that monitor a metric, after a validation and before its checkpoint.

    Raises:
        ValueError: If the validation does not compute the metric.
    """
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return
    for config in _plateau_configs(trainer):
        if config.monitor not in metrics:
            raise ValueError(f"--model.scheduler.monitor is {config.monitor!r}, but validation has {sorted(metrics)}")
        config.scheduler.step(float(metrics[config.monitor]))


def _plateau_configs(trainer: Trainer) -> Iterable[Any]:
    return (config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau)


def advance_schedule(schedule: Any) -> None:
    """Advances a schedule after a step. `ReduceLROnPlateau` advances only after validations."""
    if not isinstance(schedule, ReduceLROnPlateau):
        schedule.step()
