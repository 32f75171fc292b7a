"""What the model said, row by row: as JSON lines, and as a table on W&B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.reporting.record_lines import RecordLines
from lightning_softprompt.checkpoints.prompt_file import weights_identity
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.runs.loggers import logged_step, wandb_loggers
from lightning_softprompt.system.partial_file import Identity

SHOWN = ("row", "input", "target", "prediction")  # columns of a table, before those of scores


class PredictionWriter(Callback):
    """Writes what `predict` says as JSON lines with row, input, prediction and scores, in the order of the data.

    A line is written with its batch, as soon as all rows before it are; runs of several processes write at the end. It
    has what else the evaluation tells of a row, such as what was found for a question.

    A run that was killed is gone on with, in a single process: rows that stand in the unfinished file are not given to
    the model again, but for those that share the first batch. It takes the same rows, backbone, prompt and settings.

    Args:
        path: The file, which bears the suffix `.part` until it is whole; or `-` for standard output.
        settings: What else decides the answers, as plain values; without it, each run begins anew.
        earlier: Unfinished files of other runs, the first of which that fits is taken over.
    """

    def __init__(
        self, path: Path | Literal["-"], settings: Mapping[str, Any] | None = None, earlier: Sequence[Path] = ()
    ) -> None:
        self._lines = RecordLines(path)
        self._settings = settings if path != "-" else None
        self._earlier = earlier

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, and go on behind its rows."""
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
        records = {record["row"]: prediction(trainer, "predict", record) for record in outputs}
        self._lines.add(trainer, records)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self._lines.close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the file as it is."""
        self._lines.leave()


class TestPredictions(Callback):
    """Writes what `test` says as JSON lines with row, input, prediction, target and scores, in the order of the data.

    Args:
        path: The file, which bears the suffix `.part` until it is whole; or `-` for standard output.
    """

    __test__ = False  # it is not a test, whatever pytest makes of its name

    def __init__(self, path: Path | Literal["-"]) -> None:
        self._lines = RecordLines(path)

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
        self._lines.add(trainer, {record["row"]: targeted(trainer, "test", record) for record in outputs})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self._lines.close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the file as it is."""
        self._lines.leave()


class PredictionTable(Callback):
    """Logs predictions for the validation split to W&B, as the table `val/predictions`.

    Its rows are the first of those that were answered, the same after each validation, so that answers can be compared.
    Classes have the score of the one that was predicted; generated text has a column for each of its scores. Of several
    processes only the first shows its rows.

    Args:
        rows: How many rows.
    """

    def __init__(self, rows: int = 16) -> None:
        self.rows = rows
        self._said: dict[int, dict[str, Any]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the table before."""
        self._said = {}

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
            self._said |= {record["row"]: record for record in outputs}
            self._said = {row: self._said[row] for row in sorted(self._said)[: self.rows]}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table."""
        if trainer.sanity_checking or not self._said:
            return
        records = [targeted(trainer, "validation", record) for record in self._said.values()]
        columns, scores = of_text(records) if _data(trainer).classes is None else of_classes(records)
        # A column has one type, as W&B wants it.
        shown = [[record["row"], *(str(record[name]) for name in SHOWN[1:])] for record in records]
        data = [[*cells, *more] for cells, more in zip(shown, scores, strict=True)]
        for logger in wandb_loggers(trainer):
            logger.log_table("val/predictions", [*SHOWN, *columns], data, step=logged_step(trainer))


def of_classes(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of the scores of classes: the one of the class that was predicted."""
    return ["score"], [[record["scores"] and record["scores"].get(record["prediction"])] for record in records]


def of_text(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of the scores of generated text: all there are.

    >>> of_text([{"scores": None}, {"scores": {"rouge1": 0.5, "rougeL": 0.25}}])
    (['rouge1', 'rougeL'], [[None, None], [0.5, 0.25]])
    """
    names = list(dict.fromkeys(name for record in records for name in record["scores"] or {}))
    return names, [[(record["scores"] or {}).get(name) for name in names] for record in records]


class _Shows(Protocol):
    classes: Classes | None

    def describe_row(self, split: str, row: int) -> Mapping[str, Any]: ...
    def identity(self, split: str) -> str: ...
    def source_rows(self, split: str) -> list[int]: ...


class _Skips(Protocol):
    def skip_to(self, row: int) -> int: ...


def _data(trainer: Trainer) -> _Shows:
    return cast(_Shows, trainer.datamodule)  # type: ignore[attr-defined]


def prediction(trainer: Trainer, split: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record for the eye: with the row's text and what else its evaluation tells of it, and no target.

    Its `row` is the row's index in its source, where rows that were skipped count, so that records can be joined to it.
    """
    scores = record["scores"]
    shown = _data(trainer).describe_row(split, record["row"])
    place = {name: shown[name] for name in ("task", "file") if name in shown}
    return {
        "row": shown.get("row", record["row"]),
        **place,
        "input": shown["input"],
        "prediction": record["prediction"],
        "scores": None if scores is None else {name: rounded(score) for name, score in scores.items()},
        **record.get("details", {}),
    }


def targeted(trainer: Trainer, split: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record for the eye, with its target."""
    return {**prediction(trainer, split, record), "target": record["target"]}


def rounded(value: float) -> float | None:
    """Six digits after the point are enough; what is not finite has no JSON.

    >>> rounded(1 / 3), rounded(float("nan"))
    (0.333333, None)
    """
    return round(float(value), 6) if math.isfinite(value) else None
