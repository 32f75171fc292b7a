"""A stage of a study that writes a folder: an extended tokenizer, or a backbone with trained weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lightning_softprompt.studies.stage_run import Metrics, RunCommand, StageRun


class FolderCommand(NamedTuple):
    """A command that writes a folder.

    Args:
        words: The command.
        inputs: The option of the stage with the inputs of the command, which have no name on the command line.
    """

    words: tuple[str, ...]
    inputs: str


FOLDER_COMMANDS: Mapping[str, FolderCommand] = {
    "merge": FolderCommand(("merge",), "prompt"),
    "vocabulary": FolderCommand(("vocabulary", "extend"), "corpus"),
}


@dataclass(frozen=True)
class FolderStage(StageRun):
    """A stage that runs `softprompt vocabulary extend` or `softprompt merge`. Its result is its folder.

    An interrupted stage starts from the beginning.
    """

    @property
    def can_continue(self) -> bool:
        """Always False."""
        return False

    def read_metrics(self) -> Metrics | None:
        """Returns the size of the folder; None if it is not complete."""
        metrics = super().read_metrics()
        return metrics if self.folder.is_dir() else None

    def run(self, run_command: RunCommand) -> int:
        """Writes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.write_record(None)
        command = FOLDER_COMMANDS[self.command]
        inputs: list[str] = []
        options: list[str] = []
        for argument in self.arguments_with_folders():
            name, _, text = argument.partition("=")
            values = _read_values(text)
            if name == f"--{command.inputs}":
                inputs += values
            else:
                options += [name, *values]
        if code := run_command([*command.words, *inputs, "--out", str(self.folder), *options]):
            return code
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        self.write_record({"bytes": size})
        return 0


def _read_values(text: str) -> list[str]:
    """Returns the values of an option of a stage, which may be a list.

    >>> _read_values('["a.txt", "b.txt"]'), _read_values("8")
    (['a.txt', 'b.txt'], ['8'])
    """
    if text.startswith("["):
        return [str(value) for value in json.loads(text)]
    return [text]
