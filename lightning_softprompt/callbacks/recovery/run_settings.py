"""Settings of a run: kept in its checkpoints, and the same in all of its processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.recovery.resume import gathered
from lightning_softprompt.checkpoints.run_settings import SETTINGS, shorten, to_json
from lightning_softprompt.runs.run_settings import CommandSettings

Settings = Mapping[str, Any]


class RunSettings(Callback):
    """Keeps the settings of a run in its checkpoints, and compares them.

    Before anything is computed, several processes compare theirs, and a resumed run those of its checkpoint.

    Args:
        settings: Of the command.
        resumed: Refuses rows that are not those of the checkpoint; None where no run is resumed, or they were compared
            before.
    """

    def __init__(self, settings: CommandSettings, resumed: Callable[[Settings], None] | None = None) -> None:
        self._settings, self._resumed = settings, resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, now that the data module has its rows.

        Raises:
            ValueError: In all processes, naming those that differ and what differs; or what changed.
        """
        if trainer.world_size > 1:
            refuse_other_processes(gathered(self._settings.compared))
        if self._resumed is not None:
            self._resumed(self._settings.of_rows)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the settings."""
        checkpoint[SETTINGS] = dict(self._settings.kept)


def refuse_other_processes(settings: list[Settings]) -> None:
    """Refuses processes with other data or options than the first one.

    Args:
        settings: Of each process, in the order of their numbers.

    Raises:
        ValueError: Naming the processes and what differs.
    """
    first, found = settings[0], []
    for rank, other in enumerate(settings):
        changed = [name for name in sorted({*first, *other}) if to_json(first.get(name)) != to_json(other.get(name))]
        for name in changed:
            values = f"{shorten(first.get(name))} in process 0 and {shorten(other.get(name))} in process {rank}"
            found.append(f"{name} is {values}")
    if found:
        raise ValueError(
            f"the processes of this run have different data or options: {'; '.join(found)}. Give all of them the same "
            f"files and the same command"
        )
