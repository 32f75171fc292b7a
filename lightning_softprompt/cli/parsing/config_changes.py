"""What a command changes in its config: before it starts, and in the copy for other commands."""

from __future__ import annotations

import logging
from pathlib import Path

from jsonargparse import Namespace

from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.training.lr_range_test import STEPS
from lightning_softprompt.training.training_length import (
    default_patience,
    default_trainer_options,
    describe_default_length,
    is_unlimited,
)

log = logging.getLogger(__name__)
COMMAND_SPECIFIC = ("verbose", "return_predictions", "find_lr")  # options that only some commands have


def complete_length(config: Namespace) -> None:
    """Limit a training that sets no length, and set the logging interval; the saved config has the values."""
    if config.trainer.fast_dev_run:
        return
    if config.find_lr:
        config.trainer.max_steps, config.trainer.max_epochs, config.trainer.max_time = STEPS, -1, None
        return
    options = config.trainer.as_dict()
    config.run.early_stopping = default_patience(config.run.early_stopping, options)
    for name, value in default_trainer_options(options).items():
        config.trainer[name] = value
    if is_unlimited(options):
        rank_zero_info(describe_default_length(config.run.early_stopping))


def use_last_checkpoint(config: Namespace, training: bool) -> Path | None:
    """Replace `--ckpt_path last` by the latest checkpoint; without one, a training starts a new run.

    Args:
        config: The config of the command.
        training: Whether the command trains.

    Returns:
        The folder of the run that a training resumes; None for a new run and for other commands.

    Raises:
        ValueError: If there is no checkpoint, and the command does not train.
    """
    run = RunSpec(**config.run.as_dict())
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        if not training:
            raise ValueError(f"--ckpt_path last: no run in {run.experiment_folder} has a checkpoint yet")
        log.info("--ckpt_path last: no checkpoint in %s yet; starting a new run", run.experiment_folder)
        config.ckpt_path = None
        return None
    log.info("--ckpt_path last: %s", checkpoint)
    config.ckpt_path = str(checkpoint)
    if config.get("init_from"):
        log.info("Ignoring --init_from: the run resumes from its own checkpoint")
        config.init_from = None
    return checkpoint.parents[1] if training else None


def reusable_config(config: Namespace) -> Namespace:
    """Returns a copy for other runs and commands, without the options that concern only the start of this run."""
    reusable = config.clone()
    reusable.ckpt_path = reusable.init_from = reusable.run.name = reusable.run.accept_changes = None
    reusable.run.display_name = reusable.run.job_type = None
    for name in COMMAND_SPECIFIC:
        reusable.pop(name, None)
    return reusable
