"""Saves the settings of a run in its checkpoints, and compares them between processes and on resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.checkpoints.run_settings import SETTINGS, to_json
from lightning_softprompt.distributed.collectives import gather_objects
from lightning_softprompt.runs.run_settings import CommandSettings
from lightning_softprompt.system.printable import shorten

Settings = Mapping[str, Any]


class RunSettings(Callback):
    """Saves the settings of a run in its checkpoints, and compares them before anything is computed.

    Processes of a run compare their settings with each other, and a resumed run with those of its checkpoint.

    Args:
        settings: The settings of the command.
        resumed: Refuses rows that differ from those of the checkpoint; None if no run is resumed or the rows have been
            compared before.
    """

    def __init__(self, settings: CommandSettings, resumed: Callable[[Settings], None] | None = None) -> None:
        self._settings, self._resumed = settings, resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the settings, now that the data module has its rows.

        Raises:
            ValueError: In all processes, naming the differences.
        """
        if trainer.world_size > 1:
            refuse_other_processes(gather_objects(self._settings.process_settings))
        if self._resumed is not None:
            self._resumed(self._settings.of_rows)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings."""
        checkpoint[SETTINGS] = dict(self._settings.all_settings)


def refuse_other_processes(settings: list[Settings]) -> None:
    """Refuse processes whose data or options differ from those of the first one.

    Args:
        settings: The settings of each process, ordered by rank.

    Raises:
        ValueError: Naming the processes and what differs.
    """
    first, differences = settings[0], []
    for rank, other in enumerate(settings):
        for name in sorted({*first, *other}):
            value, other_value = first.get(name), other.get(name)
            if to_json(value) != to_json(other_value):
                values = f"{shorten(value)} in process 0 and {shorten(other_value)} in process {rank}"
                differences.append(f"{name} is {values}")
    if differences:
        raise ValueError(
            f"the processes of this run have different data or options: {'; '.join(differences)}. Start all "
            f"of them with the same files and the same command"
        )
