"""A stage of a study that writes or filters rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lightning_softprompt.studies.stage_run import Metrics, RunCommand, StageRun

ROWS = "rows.jsonl"  # the file of a stage
INPUT_OPTION = "--rows="  # the rows that a stage filters
ROW_COMMANDS = ("write", "filter")


@dataclass(frozen=True)
class RowStage(StageRun):
    """A stage that runs `softprompt write` or `softprompt filter`. Its rows are the file `rows.jsonl` of its folder.

    An interrupted file of written rows is continued. Filters start from the beginning, and give the same file.
    """

    @property
    def path(self) -> Path:
        """The file of rows."""
        return self.folder / ROWS

    @property
    def can_continue(self) -> bool:
        """Whether there are written rows."""
        return self._part.is_file() or self.path.is_file()

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{ROWS}.part")

    def read_metrics(self) -> Metrics | None:
        """Returns the numbers of rows; None if the file is not complete."""
        metrics = super().read_metrics()
        return metrics if self.path.is_file() else None

    def run(self, run_command: RunCommand) -> int:
        """Writes or filters the rows."""
        if not self.record.is_file():
            self.path.unlink(missing_ok=True)  # of a run whose record was deleted to run it again
        elif self.path.is_file() and not self._part.is_file():  # complete, but its metrics were not saved
            self.write_record(self._count_rows())
            return 0
        self.write_record(None)
        arguments = self.arguments_with_folders()
        inputs = [argument.removeprefix(INPUT_OPTION) for argument in arguments if argument.startswith(INPUT_OPTION)]
        options = [argument for argument in arguments if not argument.startswith(INPUT_OPTION)]
        if code := run_command([self.command, *inputs, str(self.path), *options]):
            return code
        self.write_record(self._count_rows())
        return 0

    def _count_rows(self) -> Metrics:
        """Returns the number of rows, and how many rows each filter dropped."""
        with self.path.open(encoding="utf-8") as file:
            counts: dict[str, float] = {"rows": sum(1 for _ in file)}
        report = self.path.with_suffix(".report.json")
        if self.command == "filter" and report.is_file():
            for item in json.loads(report.read_text())["filters"]:
                name = f"dropped/{item['name']}"
                counts[name] = counts.get(name, 0) + item["num_dropped"]
        return counts
