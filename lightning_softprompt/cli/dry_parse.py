"""What the options of a run command come to, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lightning_softprompt.cli.app import SoftPromptCLI, make_cli
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.system.errors import CommandError


@dataclass(frozen=True)
class Parsed:
    """What a run command came to, before anything runs.

    Args:
        module: The method.
        data: The data module.
        config: All values.
    """

    module: SoftPromptModule
    data: SoftPromptDataModule
    config: Namespace


class ParsedCLI(SoftPromptCLI):
    """Stops once method and data are there, which load nothing by then, and before a run has a folder."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Raises `Stopped`."""
        raise Stopped(Parsed(self.model, self.datamodule, self._given))


class Stopped(Exception):  # noqa: N818 (no error: it carries what was parsed out of the constructor)
    """What was parsed, as its only argument."""


def parsed(argv: Sequence[str]) -> Parsed:
    """Method, data and values of a run command.

    Raises:
        CommandError: If they do not fit each other.
    """
    try:
        make_cli(argv, ParsedCLI)
    except Stopped as stopped:
        found: Parsed = stopped.args[0]
        return found
    except ValueError as error:
        raise CommandError(str(error)) from error
    raise AssertionError("ParsedCLI stops before anything runs")
