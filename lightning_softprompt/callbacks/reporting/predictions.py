"""Predictions of each row: as JSON lines, and as a table on W&B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_softprompt.callbacks.reporting.record_lines import RecordLines
from lightning_softprompt.checkpoints.prompt_file import weights_identity
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.runs.loggers import validation_log_step, wandb_loggers
from lightning_softprompt.system.partial_file import Identity

TEXT_COLUMNS = ("input", "target", "prediction")  # columns of a table between `row` and `correct`
TEST_TABLE_ROWS = 1000  # W&B shows at most 10,000 rows; with inputs of 4,000 characters this table has about 4 MB


class RecordFile(Callback):
    """Closes the file of records at the end of a pass, also after an exception.

    Args:
        path: The file, whose name ends with `.part` until it is complete; or `-` for standard output.
    """

    def __init__(self, path: Path | Literal["-"]) -> None:
        self._lines = RecordLines(path)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the remaining lines and rename the file."""
        self._lines.close(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the remaining lines and rename the file."""
        self._lines.close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the incomplete file."""
        self._lines.leave()


class PredictionWriter(RecordFile):
    """Writes the predictions of `predict` as JSON lines with row, input, prediction and scores, in the data's order.

    A line is written with its batch, once all preceding rows are written; runs of several processes write at the end.
    It also has the details of the evaluation, such as the passages that were retrieved for a question.

    In a single process, a run that was killed is resumed: rows in its incomplete file are not computed again, except
    those that share the first batch. This requires the same rows, backbone, prompt and settings.

    Args:
        path: The file, whose name ends with `.part` until it is complete; or `-` for standard output.
        settings: Further values that determine the predictions; without them, no run is resumed.
        earlier: Incomplete files of other runs; the first that matches is resumed.
    """

    def __init__(
        self, path: Path | Literal["-"], settings: Mapping[str, Any] | None = None, earlier: Sequence[Path] = ()
    ) -> None:
        super().__init__(path)
        self._settings = settings if path != "-" else None
        self._earlier = earlier

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file and skip the rows that it has."""
        identity = self._identity(trainer, cast(SoftPromptModule, pl_module))
        rows = None if identity is None else _data(trainer).source_rows("predict")
        if first := self._lines.open(trainer, identity, self._earlier, rows):
            skipped = cast(_Skips, trainer.predict_dataloaders).skip_to(first)
            trainer.num_predict_batches[0] -= skipped

    def _identity(self, trainer: Trainer, module: SoftPromptModule) -> Identity | None:
        if self._settings is None or trainer.world_size > 1:
            return None
        weights = {"backbone": module.loaded.fingerprint(), "prompt": weights_identity(module.state_dict())}
        return {"rows": _data(trainer).identity("predict"), **weights, **self._settings}

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
        records = {record["row"]: describe_prediction(trainer, "predict", record) for record in outputs}
        self._lines.add(trainer, records)


class TestPredictions(RecordFile):
    """Writes the predictions of `test` as JSON lines with row, input, prediction, target and scores, in order.

    Args:
        path: The file, whose name ends with `.part` until it is complete; or `-` for standard output.
    """

    __test__ = False  # pytest would collect it as a test by its name

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
        self._lines.add(trainer, {record["row"]: describe_with_target(trainer, "test", record) for record in outputs})


class PredictionTable(Callback):
    """Logs predictions to W&B, as the table `val/predictions` or `test/predictions`.

    It shows the first rows, the same after each validation, so that predictions can be compared. Each row has its
    image, if there is one, its input, target and prediction, whether they are equal, and a column for each score: of
    each class, or of generated text. Tables of a training also have the optimizer step. With several processes, the
    table has rows of the first one only.

    Args:
        stage: `val` or `test`.
        rows: Number of rows.
    """

    def __init__(self, stage: Literal["val", "test"] = "val", rows: int = 16) -> None:
        self.stage = stage
        self.rows = rows
        self._records: dict[int, dict[str, Any]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the rows of the previous validation."""
        self._records = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the rows of the previous test."""
        self._records = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the first rows."""
        if self.stage == "val":
            self._store(trainer, outputs)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the first rows."""
        if self.stage == "test":
            self._store(trainer, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table."""
        if self.stage == "val":
            self._log(trainer, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table."""
        if self.stage == "test":
            self._log(trainer, "test")

    def _store(self, trainer: Trainer, outputs: Any) -> None:
        if wandb_loggers(trainer):
            self._records |= {record["row"]: record for record in outputs}
            first = sorted(self._records)[: self.rows]
            self._records = {row: self._records[row] for row in first}

    def _log(self, trainer: Trainer, split: str) -> None:
        if trainer.sanity_checking or not self._records:
            return
        records = [describe_with_target(trainer, split, record) for record in self._records.values()]
        has_classes = _data(trainer).classes is not None
        score_columns, scores = score_cells(records, "score/" if has_classes else "")
        table = []
        for record, cells in zip(records, scores, strict=True):
            texts = [str(record[name]) for name in TEXT_COLUMNS]  # W&B requires one type per column
            is_correct = record["prediction"] == record["target"]
            table.append([record["row"], *texts, is_correct, *cells])
        columns = ["row", *TEXT_COLUMNS, "correct", *score_columns]
        images = [_data(trainer).row_image(split, row) for row in self._records]
        if images and images[0] is not None:
            import wandb

            columns.insert(1, "image")
            table = [[row[0], wandb.Image(image), *row[1:]] for image, row in zip(images, table, strict=True)]
        if trainer.state.fn == TrainerFn.FITTING:
            columns.insert(0, "step")
            table = [[trainer.global_step, *cells] for cells in table]
        for logger in wandb_loggers(trainer):
            logger.log_table(f"{self.stage}/predictions", columns, table, step=validation_log_step(trainer))


def score_cells(records: Sequence[Mapping[str, Any]], prefix: str) -> tuple[list[str], list[list[Any]]]:
    """Returns the names and cells of the columns of scores.

    >>> score_cells([{"scores": None}, {"scores": {"rouge1": 0.5, "rougeL": 0.25}}], "")
    (['rouge1', 'rougeL'], [[None, None], [0.5, 0.25]])
    """
    scores = [record["scores"] or {} for record in records]
    names = list(dict.fromkeys(name for of_row in scores for name in of_row))
    cells = [[of_row.get(name) for name in names] for of_row in scores]
    return [f"{prefix}{name}" for name in names], cells


class _DescribesRows(Protocol):
    classes: Classes | None

    def describe_row(self, split: str, row: int) -> Mapping[str, Any]: ...
    def row_image(self, split: str, row: int) -> Any: ...
    def identity(self, split: str) -> str: ...
    def source_rows(self, split: str) -> list[int]: ...


class _Skips(Protocol):
    def skip_to(self, row: int) -> int: ...


def _data(trainer: Trainer) -> _DescribesRows:
    return cast(_DescribesRows, trainer.datamodule)  # type: ignore[attr-defined]


def describe_prediction(trainer: Trainer, split: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record for people: with the row's text and the details of its evaluation, without target.

    Its `row` is the row's index in its source, which includes skipped rows, so that records can be joined to it.
    """
    row = _data(trainer).describe_row(split, record["row"])
    source = {name: row[name] for name in ("task", "file") if name in row}
    scores = record["scores"]
    if scores is not None:
        scores = {name: round_score(score) for name, score in scores.items()}
    return {
        "row": row.get("row", record["row"]),
        **source,
        "input": row["input"],
        "prediction": record["prediction"],
        "scores": scores,
        **record.get("details", {}),
    }


def describe_with_target(trainer: Trainer, split: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record for people, with its target."""
    return {**describe_prediction(trainer, split, record), "target": record["target"]}


def round_score(value: float) -> float | None:
    """Rounds to six decimal places; JSON has no non-finite numbers, which become None.

    >>> round_score(1 / 3), round_score(float("nan"))
    (0.333333, None)
    """
    return round(float(value), 6) if math.isfinite(value) else None
