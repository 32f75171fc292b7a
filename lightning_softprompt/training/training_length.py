"""The length of a training, and its logging interval, if the options leave them open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_EPOCHS = 10  # of a training without a limit; Lightning's default is 1,000
PATIENCE = 3  # validations without improvement that end such a training
LOG_INTERVAL = 10  # steps; Lightning's default of 50 logs nothing in a short training


def default_trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the Trainer options that `options` leave open: `max_epochs` and `log_every_n_steps`.

    Args:
        options: The Trainer's options by name.
    """
    chosen: dict[str, Any] = {}
    if is_unlimited(options):
        chosen["max_epochs"] = MAX_EPOCHS
    if options.get("log_every_n_steps") is None:
        max_steps = options.get("max_steps", -1)
        chosen["log_every_n_steps"] = min(LOG_INTERVAL, max(1, max_steps // 10)) if max_steps > 0 else LOG_INTERVAL
    return chosen


def is_unlimited(options: Mapping[str, Any]) -> bool:
    """Whether no option limits the training. `max_epochs: -1` is a request for an unlimited one."""
    return options.get("max_epochs") is None and options.get("max_steps", -1) == -1 and not options.get("max_time")


def default_patience(early_stopping: int | None, options: Mapping[str, Any]) -> int:
    """Returns the number of validations without improvement that end the training; 0 for no such limit.

    Args:
        early_stopping: The option of the run; None if it is not set.
        options: The Trainer's options by name, before `default_trainer_options`.
    """
    if early_stopping is not None:
        return early_stopping
    validates = options.get("limit_val_batches") != 0
    return PATIENCE if is_unlimited(options) and validates else 0


def describe_default_length(patience: int) -> str:
    """Describes the length of a training without a limit, and how to set it."""
    early = f", or until {patience} validations bring no improvement" if patience else ""
    return f"Training for {MAX_EPOCHS} epochs{early}; set --trainer.max_steps or --trainer.max_epochs to change this"
