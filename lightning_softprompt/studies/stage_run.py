"""One run of a study: which options it has, and whether it is complete."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning_softprompt.studies.options import Options
from lightning_softprompt.system.atomic_files import write_file

Metrics = Mapping[str, float]
RunCommand = Callable[[Sequence[str]], int]  # runs a command with its arguments and returns the exit code
STAGE_REFERENCE = re.compile(r"\$\{([^}]*)\}")  # `${NAME}`, the folder of a stage


@dataclass(frozen=True)
class StageRun(ABC):
    """A run of a study. A record next to its folder contains its options, and its metrics once it is complete.

    Args:
        command: The command of the run.
        variant_folder: Folder that contains the folder of the run.
        stage: The stage that the run executes or tests.
        test: Name of the test; empty for other runs.
        arguments: Options as on the command line, without those for its start and its folder.
        variant: Options that distinguish the variant from the others.
        stage_folders: Folders of its stage and of earlier ones.
    """

    command: str
    variant_folder: Path
    stage: str
    test: str
    arguments: tuple[str, ...]
    variant: Options
    stage_folders: Mapping[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.stage}.{self.test}" if self.test else self.stage

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.variant_folder / self.name

    @property
    def record(self) -> Path:
        """File with its options and, once it is complete, its metrics."""
        return self.variant_folder / f"{self.name}.json"

    @property
    @abstractmethod
    def can_continue(self) -> bool:
        """Whether there are files from which an interrupted run continues."""

    @abstractmethod
    def run(self, run_command: RunCommand) -> int:
        """Starts or continues the run and returns the exit code of its command."""

    def read_metrics(self) -> Metrics | None:
        """Returns the metrics of a complete run; None if it is not complete.

        Raises:
            ValueError: If the run was started with other options.
        """
        if not self.record.is_file():
            return None
        saved = _read_record(self.record)
        if saved["metrics"] is None and not self.can_continue:
            return None  # it failed before it wrote anything, for example because an option was misspelled
        if saved["options"] != self._identity:
            before = _differing_options(saved["options"], self._identity)
            now = _differing_options(self._identity, saved["options"])
            raise ValueError(
                f"{self.folder} was started with other options: {before or 'nothing'} then, {now or 'nothing'} now. "
                f"Delete {self.record} to run it again, or choose another folder for the study"
            )
        return saved["metrics"]

    def arguments_with_folders(self) -> list[str]:
        """Returns the options with the folders of the stages to which they refer."""
        return [STAGE_REFERENCE.sub(self._stage_folder, argument) for argument in self.arguments]

    def _stage_folder(self, match: re.Match[str]) -> str:
        return str(self.stage_folders[match[1]].absolute())

    @property
    def _identity(self) -> dict[str, str]:
        """What must be equal in the record of the same run: its options and the contents of their config files."""
        options = dict(argument.split("=", 1) for argument in self.arguments)
        contents = {}
        for value in sorted(set(options.values())):
            if value.endswith((".yaml", ".yml")) and Path(value).is_file():
                contents[f"content of {value}"] = short_hash(Path(value).read_bytes())
        return {**options, **contents}

    def write_record(self, metrics: Metrics | None) -> None:
        """Saves the options, and the metrics of a complete run."""
        content = {"options": self._identity, "metrics": metrics}
        write_file(self.record, f"{json.dumps(content, indent=2)}\n".encode())


def _differing_options(options: Mapping[str, str], others: Mapping[str, str]) -> list[str]:
    return sorted(f"{name}={value}" for name, value in options.items() if others.get(name) != value)


def _read_record(path: Path) -> dict[str, Any]:
    """Reads the record of a run.

    Raises:
        ValueError: If the file is damaged or not a record.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to run it again") from error
    if not isinstance(saved, dict) or not {"options", "metrics"} <= saved.keys():
        raise ValueError(f"{path} is not the record of a run of a study; delete it to run it again")
    return saved


def short_hash(content: bytes) -> str:
    """Returns a short hash of a content."""
    return sha256(content).hexdigest()[:8]
