"""Prints the results of a run: metrics with intervals, sample predictions, and the files that were written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_softprompt.callbacks.reporting.predictions import describe_with_target
from lightning_softprompt.callbacks.reporting.run_files import stage_metrics
from lightning_softprompt.core.types import Batch
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.prepared import Split
from lightning_softprompt.reports.result_table import format_metrics
from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.system.printable import one_line, shorten

SAMPLES = 5
MAX_CHARACTERS = 90  # of a text of a sample prediction
OUTPUTS = ("metrics.json", "test_predictions.jsonl", "test_cases.html", "plots/learning_curve.png",
           "plots/val_confusion.png", "plots/test_confusion.png", "plots/test_rouge.png")  # fmt: skip

Record = Mapping[str, Any]


@final
class ResultSummary(Callback):
    """Prints the best validation at the end of a training, and the results of `validate` and `test`.

    Sample predictions begin with wrong ones, or with the lowest scores for generated text. With several processes, they
    are rows of the first one.

    Args:
        folder: The folder of the run.
        monitor: The metric that determines the best validation.
        mode: Whether its lowest or its highest value is best.
    """

    def __init__(self, folder: Path, monitor: str, mode: Literal["min", "max"]) -> None:
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self._has_trained = False  # whether this start took a step
        self._records: dict[int, Record] = {}  # the rows of this pass that may be shown
        self._best: dict[str, Any] | None = None  # step and metrics of the best validation
        self._best_records: list[Record] = []  # of this process; a resumed run does not have those of earlier ones

    def state_dict(self) -> dict[str, Any]:
        """The best validation."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best validation."""
        self._best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that the training has steps left, without which Lightning does not call this."""
        self._has_trained = True

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
        """Store the rows that may be shown."""
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
        """Store the rows that may be shown."""
        self._store(trainer, outputs)

    def _store(self, trainer: Trainer, outputs: Any) -> None:
        score = _data(trainer).evaluation.ranking_score
        self._records |= {record["row"]: record for record in outputs or () if record}
        shown = sorted(self._records, key=lambda row: (_correctness(self._records[row], score), row))[:SAMPLES]
        self._records = {row: self._records[row] for row in shown}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the results of `validate`; in a training, store the best ones."""
        if trainer.sanity_checking:
            return
        metrics = stage_metrics(trainer, "val")
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._print(trainer, "validation", "Validation", metrics, list(self._records.values()))
        elif self._is_best(metrics.get(self.monitor, math.nan)):
            self._best = {"step": trainer.global_step, "metrics": metrics}
            self._best_records = list(self._records.values())

    def _is_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        best = self._best["metrics"][self.monitor]
        return bool(value < best if self.mode == "min" else value > best)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the results of `test`."""
        self._print(trainer, "test", "Test", stage_metrics(trainer, "test"), list(self._records.values()))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the best validation of a training."""
        if not self._has_trained and trainer.max_steps != 0:
            rank_zero_info(
                f"The training is complete: the checkpoint is of its last step, {trainer.global_step}. Raise "
                f"--trainer.max_steps or --trainer.max_epochs to continue it"
            )
        if self._best is not None:
            title = f"Best validation ({self.monitor}), step {self._best['step']} of {trainer.global_step}"
            self._print(trainer, "validation", title, self._best["metrics"], self._best_records)

    def _print(
        self, trainer: Trainer, split: Split, title: str, metrics: Mapping[str, float], records: list[Record]
    ) -> None:
        if not trainer.is_global_zero:
            return
        stage = "test" if split == "test" else "val"
        rows = describe_rows(count_scored_rows(trainer, split), metrics.get(f"{stage}/generated"))
        lines = [f"{title}, {rows}", format_metrics(metrics, stage)]
        if records:
            lines += ["", "Sample predictions, the least correct ones first:"]
            lines += [_describe_sample(describe_with_target(trainer, split, record)) for record in records]
        files = [name for name in OUTPUTS if (self.folder / name).is_file()]
        if files:
            lines += ["", f"Files in {self.folder}: {', '.join(files)}"]
        rank_zero_info("\n" + "\n".join(lines) + "\n")


def count_scored_rows(trainer: Trainer, split: Split) -> int:
    """Returns the number of rows that an evaluation scores, on all processes."""
    loaders = trainer.test_dataloaders if split == "test" else trainer.val_dataloaders
    drawn = getattr(getattr(loaders, "batch_sampler", None), "drawn", None)
    return len(_data(trainer).split(split)) if drawn is None else sum(map(len, drawn))


def describe_rows(scored: int, generated: float | None) -> str:
    """Describes the number of rows that an evaluation scores, and of those for which it generates an answer.

    >>> describe_rows(16, 4.0), describe_rows(16, 16.0), describe_rows(1000, None)
    ('16 rows (metrics of generated text: 4 rows)', '16 rows', '1,000 rows')
    """
    rows = f"{scored:,} rows"
    if generated is None or generated == scored:
        return rows
    return f"{rows} (metrics of generated text: {generated:,.0f} rows)"


def _data(trainer: Trainer) -> SoftPromptDataModule:
    return cast(SoftPromptDataModule, trainer.datamodule)  # type: ignore[attr-defined]


def _correctness(record: Record, score: str | None) -> float:
    """A number that orders rows from wrong to correct."""
    scores = record["scores"] or {}
    if score is not None:
        value = float(scores.get(score, math.nan))
        return value if math.isfinite(value) else math.inf
    return float(record["prediction"] == record.get("target"))


def _describe_sample(record: Record) -> str:
    texts = {name: shorten(one_line(record[name]), MAX_CHARACTERS) for name in ("input", "prediction", "target")}
    mark = "correct" if record["prediction"] == record["target"] else f"target: {texts['target']}"
    return f"  row {record['row']}: {texts['input']}\n    prediction: {texts['prediction']} ({mark})"
