"""Parses the options of a run command without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lightning_softprompt.cli.app import SoftPromptCLI, make_cli
from lightning_softprompt.cli.errors import configure_output
from lightning_softprompt.cli.run_config import config_beside
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.system.errors import CommandError

VALIDATION_OPTIONS = ("accelerator", "precision", "limit_val_batches")


@dataclass(frozen=True)
class ParsedRun:
    """A run command after parsing, before anything runs.

    Args:
        module: The method.
        data: The data module.
        config: All values.
    """

    module: SoftPromptModule
    data: SoftPromptDataModule
    config: Namespace

    def make_validation_trainer(self) -> Trainer:
        """Returns a trainer for validations of the run, one process that writes no files."""
        options = {name: self.config.trainer[name] for name in VALIDATION_OPTIONS}
        return Trainer(
            **options, devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, enable_checkpointing=False,
        )  # fmt: skip


class DryParseCLI(SoftPromptCLI):
    """Stops after method and data module are created: neither has loaded anything, and no run folder exists."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Raise `Stopped`."""
        raise Stopped(ParsedRun(self.model, self.datamodule, self.run_config))


class Stopped(Exception):  # noqa: N818 (not an error: it carries the parsed run out of the constructor)
    """Carries the parsed run as its only argument."""


def parse_run(argv: Sequence[str]) -> ParsedRun:
    """Parse a run command into its method, data module and config.

    Raises:
        CommandError: If the options are invalid or contradict each other.
    """
    configure_output()
    try:
        make_cli(argv, DryParseCLI)
    except Stopped as stopped:
        run: ParsedRun = stopped.args[0]
        return run
    except ValueError as error:
        raise CommandError(str(error)) from error
    raise AssertionError("DryParseCLI stops before anything runs")


def parse_validation(prompt: Path, options: Sequence[str]) -> ParsedRun:
    """Parse the options of a validation of a prompt, after those in the config of its run, and load the backbone.

    Raises:
        CommandError: If the options are invalid, or there are none and the prompt has no config.
    """
    config = config_beside(prompt)
    if config is None and not options:
        raise CommandError(f"no config.yaml belongs to {prompt}; add --config CONFIG, or --model and --data")
    run = parse_run(["validate", *([] if config is None else ["--config", str(config)]), *options])
    run.module.configure_model()
    return run
