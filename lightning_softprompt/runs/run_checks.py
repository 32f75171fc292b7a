"""Refuses Trainer options and callbacks that a run cannot use, before anything is loaded or written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

IsWrong = Callable[[Any], bool]


def _is_no_time(value: Any) -> bool:
    """Whether a limit of time, as text, mapping or `timedelta`, is zero."""
    if isinstance(value, str):
        return not re.search("[1-9]", value)
    if isinstance(value, Mapping):
        return not any(value.values())
    return value is not None and not value


UNTRAINED = "nothing would be trained; increase it, or use test or predict with --init_from or --ckpt_path"
UNMEASURED = (
    f"{UNTRAINED}; only the callback EWC measures the importance of parameters without training them, and only a "
    "readout with fit_first is fitted"
)
TRAINING_CHECKS: Mapping[str, tuple[IsWrong, str]] = {
    "max_epochs": (lambda value: value == 0, UNTRAINED),
    "max_steps": (lambda value: value == 0, UNMEASURED),
    "max_time": (_is_no_time, UNTRAINED),
    "limit_train_batches": (lambda value: value is not None and value == 0, UNTRAINED),
    "enable_checkpointing": (
        lambda value: value is False,
        "a training is saved as checkpoints; omit the option (--run.keep_last sets their number)",
    ),
    "accumulate_grad_batches": (lambda value: value < 1, "it must be at least 1"),
    "gradient_clip_val": (
        lambda value: value is not None and not value >= 0,
        "it must be at least 0; a negative value would reverse gradients",
    ),
    "val_check_interval": (
        lambda value: isinstance(value, int | float) and value <= 0,
        "it must be a number of steps or a share of an epoch above 0; --trainer.limit_val_batches 0 disables "
        "validation",
    ),
    "check_val_every_n_epoch": (lambda value: value is not None and value < 1, "it must be at least 1, or null"),
}
COMMON_CHECKS: Mapping[str, tuple[IsWrong, str]] = {
    "precision": (lambda value: str(value).startswith("64"), "prompts are trained in float32; use 32-true"),
    "log_every_n_steps": (
        lambda value: value is not None and value < 0,
        "it must be at least 1, or 0 to log nothing during training",
    ),
    "barebones": (lambda value: value is True, "a run requires its loggers and checkpoints; omit the option"),
}
REFUSED: Mapping[type[Callback], str] = {
    StochasticWeightAveraging: "it copies the model before the prompt is created, and would average nothing; use "
    "EMAWeightAveraging",
    LearningRateFinder: "it would change the rate of a training whose settings are already saved; run "
    "`softprompt fit --find_lr` first, then train with --model.lr",
    BackboneFinetuning: "it would train the frozen backbone; use the method FullFineTuning or LoRA",
    ModelPruning: "it prunes the weights of the frozen layers; use the callback Pruning",
}


def refuse_early_copies(callbacks: Iterable[Callback], module: LightningModule) -> None:
    """Refuse callbacks that copied the module before its prompt was created: the copy has no trainable parameters.

    Raises:
        ValueError: Naming the callback.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for callback in callbacks:
        copies = (value for value in vars(callback).values() if isinstance(value, type(module)) and value is not module)
        if any(not trained <= {name for name, _ in copy.named_parameters()} for copy in copies):
            raise ValueError(
                f"{type(callback).__name__} copied the model in `setup`, before `configure_model` created the prompt; "
                f"let it call `configure_model` first, or copy in `on_fit_start`"
            )


def refuse_options(command: str, trainer: Mapping[str, Any], can_skip_training: bool = False) -> None:
    """Refuse invalid options of the Trainer.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        trainer: The Trainer's options by name.
        can_skip_training: Whether a run without a step has a result, which is that of a callback or a fitted readout.

    Raises:
        ValueError: Naming the option and the fix.
    """
    checks = {**COMMON_CHECKS, **(TRAINING_CHECKS if command == "fit" else {})}
    if can_skip_training:
        del checks["max_steps"]
    for name, (is_wrong, advice) in checks.items():
        if name in trainer and is_wrong(trainer[name]):
            raise ValueError(f"--trainer.{name} is {trainer[name]}: {advice}")
    devices = str(trainer.get("devices", "auto"))
    if is_on_cpu(trainer) and devices != "auto" and not re.fullmatch(r"0*[1-9]\d*", devices):
        raise ValueError(f"--trainer.devices is {devices}: on a CPU it is a number of processes, at least 1, or auto")


def is_on_cpu(trainer: Mapping[str, Any]) -> bool:
    """Whether a run with these options of the Trainer runs on a CPU."""
    accelerator = trainer.get("accelerator", "auto")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def refuse_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that do not work with soft prompts.

    Raises:
        ValueError: Naming the callback and an alternative.
    """
    for callback in callbacks:
        for cls, reason in REFUSED.items():
            if isinstance(callback, cls):
                raise ValueError(f"{type(callback).__name__} cannot be used here: {reason}")
        if type(callback) is WeightAveraging and callback._use_buffers:
            raise ValueError(
                "WeightAveraging cannot average the buffers of the backbone, some of which are not numbers; set its "
                "use_buffers to false, or use EMAWeightAveraging"
            )
