"""What the model said, row by row: as JSON lines, and as a table on W&B."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.loggers import logged_step, wandb_loggers
from lightning_softprompt.types import Batch

Records = list[dict[str, Any]]


class PredictionWriter(Callback):
    """Writes what `predict` says as JSON lines with row, input, prediction and scores, in the order of the data.

    A line is written with its batch, as soon as all rows before it are; runs of several processes write at the end.

    Args:
        path: The file, which bears the suffix `.part` until it is whole; or `-` for standard output.
    """

    def __init__(self, path: Path | Literal["-"]) -> None:
        self._lines = _RecordLines(path)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        self._lines.open(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch."""
        self._lines.add(trainer, [prediction(trainer, "predict", record) for record in outputs])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self._lines.close(trainer)


class TestPredictions(Callback):
    """Writes what `test` says as JSON lines with row, input, prediction, target and scores, in the order of the data.

    Args:
        path: The file, which bears the suffix `.part` until it is whole; or `-` for standard output.
    """

    __test__ = False  # it is not a test, whatever pytest makes of its name

    def __init__(self, path: Path | Literal["-"]) -> None:
        self._lines = _RecordLines(path)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        self._lines.open(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch."""
        records = [{**prediction(trainer, "test", record), "target": record["target"]} for record in outputs]
        self._lines.add(trainer, records)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self._lines.close(trainer)


class PredictionTable(Callback):
    """Logs the predictions for the first rows of the validation split to W&B, as the table `val/predictions`.

    The rows are the same after each validation, so that answers can be compared. Of several processes only the first
    shows its rows.

    Args:
        rows: How many rows.
    """

    def __init__(self, rows: int = 16) -> None:
        self.rows = rows
        self._table: dict[int, list[Any]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the table before."""
        self._table = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows that the table shows."""
        if wandb_loggers(trainer):
            wanted = (record for record in outputs if record["row"] < self.rows)
            self._table |= {record["row"]: self._cells(trainer, record) for record in wanted}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table."""
        if trainer.sanity_checking or not self._table:
            return
        columns = ["row", "input", "target", "prediction", "score"]
        data = [self._table[row] for row in sorted(self._table)]
        for logger in wandb_loggers(trainer):
            logger.log_table("val/predictions", columns, data, step=logged_step(trainer))

    @staticmethod
    def _cells(trainer: Trainer, record: Mapping[str, Any]) -> list[Any]:
        said = prediction(trainer, "validation", record)
        score = None if said["scores"] is None else said["scores"].get(said["prediction"])
        target, answer = str(record["target"]), str(said["prediction"])  # of one type, which W&B wants of a column
        return [said["row"], said["input"], target, answer, score]


class _Shows(Protocol):
    def shown(self, split: str, row: int) -> Mapping[str, str | None]: ...


def prediction(trainer: Trainer, split: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record for the eye: with the row's text, and no target."""
    data = cast(_Shows, trainer.datamodule)  # type: ignore[attr-defined]
    scores = record["scores"]
    return {
        "row": record["row"],
        "input": data.shown(split, record["row"])["input"],
        "prediction": record["prediction"],
        "scores": None if scores is None else {name: rounded(score) for name, score in scores.items()},
    }


def rounded(value: float) -> float | None:
    """Six digits after the point are enough; what is not finite has no JSON.

    >>> rounded(1 / 3), rounded(float("nan"))
    (0.333333, None)
    """
    return round(float(value), 6) if math.isfinite(value) else None


class _RecordLines:
    """A file of JSON lines, ordered by row, that the first process writes for all."""

    def __init__(self, path: Path | Literal["-"]) -> None:
        self._path = None if path == "-" else Path(path)
        self._file: TextIO | None = None
        self._waiting: dict[int, str] = {}  # rows that came before an earlier one did
        self._next = 0

    def open(self, trainer: Trainer) -> None:
        self._waiting, self._next = {}, 0
        if not trainer.is_global_zero:
            return
        if self._path is None:
            self._file = sys.stdout
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("w", encoding="utf-8")

    @property
    def _part(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".part")

    def add(self, trainer: Trainer, records: Records) -> None:
        self._waiting |= {record["row"]: json.dumps(record, ensure_ascii=False) for record in records}
        if trainer.world_size == 1:
            self._write(self._in_turn())

    def _in_turn(self) -> Iterable[str]:
        while self._next in self._waiting:
            yield self._waiting.pop(self._next)
            self._next += 1

    def _write(self, lines: Iterable[str]) -> None:
        assert self._file is not None
        self._file.writelines(f"{line}\n" for line in lines)
        self._file.flush()

    def close(self, trainer: Trainer) -> None:
        lines = _of_all_processes(self._waiting)
        if self._file is None:
            return
        self._write(line for _, line in sorted(lines.items()))
        if self._path is not None:
            self._file.close()
            self._part.replace(self._path)
        self._file = None


def _of_all_processes(lines: dict[int, str]) -> dict[int, str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return lines
    gathered: list[dict[int, str]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, lines)
    return {row: line for part in gathered for row, line in part.items()}
