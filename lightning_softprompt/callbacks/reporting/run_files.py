"""What a run leaves in its folder for people and scripts: `metrics.json` and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods.stage_metrics import TRAIN_SAMPLE
from lightning_softprompt.runs.loggers import is_logging_step, metrics_files, validation_log_step, wandb_loggers
from lightning_softprompt.system.atomic_files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_softprompt.evaluation.base import Evaluation

Metrics = dict[str, float | None]
LATEST = ("train", "val", TRAIN_SAMPLE)  # parts of the report that a run resumed at its end would not compute again
TRAIN, SAMPLE, VAL, BEST = "#8fb3d9", "#3c8d6e", "#1f4e8c", "#d1495b"


class RunFiles(Callback):
    """Keeps `metrics.json` and `plots/` of a run's folder up to date.

    `metrics.json` has the latest metrics by stage, the best validation, epoch, step, seconds of training and the number
    of trainable parameters. It is written after each validation and test, and when training ends, which also draws
    `plots/learning_curve.png`. Figures of an evaluation are saved as `plots/<stage>_<name>.png`; during training, the
    file shows the best validation. W&B gets the figures of each validation as `plots/val_<name>`, and those of the best
    one when training ends as `plots/val_<name>_best`. A resumed run continues the history of the interrupted one.

    Args:
        folder: The run's folder.
        monitor: The metric that determines the best validation.
        mode: Whether its lowest or its highest value is best.
    """

    def __init__(self, folder: Path, monitor: str = "val/loss", mode: Literal["min", "max"] = "min") -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self._report: dict[str, Any] = {}
        self._train: list[tuple[int, float]] = []  # optimizer steps and losses
        self._val: list[tuple[int, int, dict[str, float]]] = []  # optimizer steps, epochs and metrics
        self._images: dict[str, bytes] = {}  # figures of the current validation or test, by file name
        self._seconds = 0.0  # of training before this start
        self._since: float | None = None
        self._epoch = 0  # of the last step

    @property
    def report(self) -> Mapping[str, Any]:
        """The contents of `metrics.json`."""
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """The history, in plain lists."""
        train, val = [list(point) for point in self._train], [list(point) for point in self._val]
        latest = {name: self._report[name] for name in LATEST if name in self._report}
        return {"train": train, "val": val, "seconds": self._training_seconds(), "epoch": self._epoch, "latest": latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history of the interrupted run."""
        self._train = [(step, loss) for step, loss in state_dict["train"]]
        self._val = [(step, epoch, metrics) for step, epoch, metrics in state_dict["val"]]
        self._seconds, self._epoch = state_dict["seconds"], state_dict.get("epoch", 0)
        self._report |= state_dict.get("latest", {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the report of a trained run, to which a test adds."""
        path = self.folder / "metrics.json"
        if stage != "fit" and not self._report and path.is_file():
            self._report = json.loads(path.read_text())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the rows of `metrics.csv` after the checkpoint from which the run is resumed."""
        for file in metrics_files(trainer):
            file.truncate(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Store the loss of each logging step."""
        step, self._epoch = trainer.global_step, trainer.current_epoch
        if not is_logging_step(trainer, step) or (self._train and self._train[-1][0] == step):
            return
        metrics = stage_metrics(trainer, "train")
        if "train/loss" in metrics:
            self._train.append((step, metrics["train/loss"]))
        self._report["train"] = finite(metrics)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures of the evaluation before its counts are reset."""
        self._draw_figures(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures of the evaluation before its counts are reset."""
        self._draw_figures(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics; in training, also add them to the history."""
        if trainer.sanity_checking:
            return
        metrics = stage_metrics(trainer, "val")
        self._report["val"] = finite(metrics)
        sample = stage_metrics(trainer, TRAIN_SAMPLE)
        if sample:
            self._report[TRAIN_SAMPLE] = finite(sample)
        if trainer.state.fn == TrainerFn.FITTING:
            self._warn_without_monitor(metrics)
            self._val.append((trainer.global_step, trainer.current_epoch, {**metrics, **sample}))
            self._report_training(trainer, pl_module)
        self._write(trainer)
        self._save_figures(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics."""
        self._report["test"] = finite(stage_metrics(trainer, "test"))
        self._write(trainer)
        self._save_figures(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final metrics and draw the learning curve."""
        self._seconds, self._since = self._training_seconds(), None
        self._report_training(trainer, pl_module)
        self._write(trainer)
        if trainer.is_global_zero and (self._train or self._val):
            curve = learning_curve(self._train, self._val, self.monitor, self.mode)
            self._save("learning_curve", to_png(curve))
            self._log_file(trainer, "learning_curve", "learning_curve")
        if trainer.is_global_zero:
            for name in self._images:
                self._log_file(trainer, f"{name}_best", name)

    def _training_seconds(self) -> float:
        return self._seconds + (0.0 if self._since is None else perf_counter() - self._since)

    def _warn_without_monitor(self, metrics: Mapping[str, float]) -> None:
        if self.monitor not in metrics and not self._val:
            rank_zero_warn(f"{self.monitor} determines the best validation, but validation computes {sorted(metrics)}")

    def _report_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sizes = dict.fromkeys((True, False), 0)
        for parameter in pl_module.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        self._report |= {
            "best": self._best(),
            "epoch": self._epoch,
            "global_step": trainer.global_step,
            "trainable_parameters": sizes[True],
            "frozen_parameters": sizes[False],
            "seconds": round(self._training_seconds(), 3),
        }

    def _best(self) -> dict[str, Any] | None:
        if (index := best_index(self._val, self.monitor, self.mode)) is None:
            return None
        step, epoch, metrics = self._val[index]
        return {"metric": self.monitor, "value": metrics[self.monitor], "epoch": epoch, "global_step": step}

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            write_file(self.folder / "metrics.json", f"{json.dumps(self._report, indent=2, sort_keys=True)}\n".encode())

    def _draw_figures(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        evaluations = cast("Mapping[str, Evaluation]", pl_module.evaluations)
        self._images = {}
        if trainer.sanity_checking or stage not in evaluations:
            return
        figures = evaluations[stage].figures()  # in every process: figures sum the counts of all processes
        if trainer.is_global_zero:
            self._images = {f"{stage}_{name}": to_png(figure) for name, figure in figures.items()}

    def _save_figures(self, trainer: Trainer) -> None:
        """Log the figures; save them to files, in training only those of the best validation."""
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        best = best_index(self._val, self.monitor, self.mode) if is_fitting else None
        is_best = best is None or best == len(self._val) - 1
        for name, image in self._images.items():
            # a run that is resumed in another folder has no file of the best validation
            if is_best or not self._path(name).is_file():
                self._save(name, image)
            self._log_image(trainer, name, image)

    def _path(self, name: str) -> Path:
        return self.folder / "plots" / f"{name}.png"

    def _save(self, name: str, image: bytes) -> None:
        try:
            write_file(self._path(name), image)
        except OSError as error:  # a plot can be drawn again from metrics.csv, so it does not stop a run
            rank_zero_warn(f"a plot could not be saved: {error}")

    def _log_file(self, trainer: Trainer, name: str, file: str) -> None:
        if self._path(file).is_file():
            self._log_image(trainer, name, self._path(file).read_bytes())

    def _log_image(self, trainer: Trainer, name: str, image: bytes) -> None:
        for logger in wandb_loggers(trainer):
            logger.log_image(f"plots/{name}", [Image.open(BytesIO(image))], step=validation_log_step(trainer))


def to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def stage_metrics(trainer: Trainer, stage: str) -> dict[str, float]:
    """Returns the latest value of each metric of a stage, by its full name."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(f"{stage}/")}


def finite(metrics: Mapping[str, float]) -> Metrics:
    """Returns metrics for JSON, which has no non-finite numbers: they become None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def best_index(val: Sequence[tuple[int, int, Mapping[str, float]]], monitor: str, mode: str) -> int | None:
    """Returns the index of the best validation, the first of equals; None if no value is finite.

    >>> best_index([(1, 0, {"val/f1": 0.5}), (2, 1, {"val/f1": 0.7}), (3, 2, {"val/f1": 0.7})], "val/f1", "max")
    1
    """
    sign = 1 if mode == "min" else -1
    candidates = []
    for index, (_, _, metrics) in enumerate(val):
        value = sign * metrics.get(monitor, math.nan)
        if math.isfinite(value):
            candidates.append((value, index))
    return min(candidates)[1] if candidates else None


def learning_curve(
    train: Sequence[tuple[int, float]],
    val: Sequence[tuple[int, int, Mapping[str, float]]],
    monitor: str = "val/loss",
    mode: str = "min",
) -> Figure:
    """Draws losses over optimizer steps, and below them the monitored metric unless it is the loss; marks the best."""
    from matplotlib.figure import Figure

    panels = 1 if monitor == "val/loss" else 2
    figure = Figure(figsize=(7, 2 + 2.4 * panels), layout="constrained")
    rows = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    if train:
        rows[0].plot(*zip(*train, strict=True), color=TRAIN, marker=_marker(train), markersize=3, label="training")
    _plot_validation(rows[0], val, "val/loss")
    rows[0].set_ylabel("loss")
    if panels == 2:
        _plot_validation(rows[1], val, monitor)
        rows[1].set_ylabel(monitor.removeprefix("val/").replace("_", " "))
    if (best := best_index(val, monitor, mode)) is not None:
        _mark(rows[-1], val[best][0], val[best][2][monitor])
    for axes in rows:
        _tidy(axes)
    rows[-1].set_xlabel("optimizer step")
    return figure


def _plot_validation(axes: Axes, val: Sequence[tuple[int, int, Mapping[str, float]]], name: str) -> None:
    of_sample = f"{TRAIN_SAMPLE}/{name.removeprefix('val/')}"
    styles = {of_sample: (SAMPLE, "--", "sample of the training rows"), name: (VAL, "-", "validation")}
    for metric, (color, line, label) in styles.items():
        points = [(step, metrics[metric]) for step, _, metrics in val if metric in metrics]
        if points:
            marker = _marker(points)
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, markersize=4, label=label)


def _marker(points: Sequence[Any]) -> str:
    """Markers for few points: a single point would be invisible as a line."""
    return "o" if len(points) <= 60 else ""


def _mark(axes: Axes, step: int, value: float) -> None:
    label = f"best: {value:.4g} at step {step}"
    axes.plot([step], [value], color=BEST, marker="*", markersize=13, linestyle="none", zorder=3, label=label)


def _tidy(axes: Axes) -> None:
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
