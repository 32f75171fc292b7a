"""`Trainer`: Lightning's Trainer with the defaults of this package and a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lightning_softprompt.callbacks.reporting.progress_bar import StepProgressBar
from lightning_softprompt.checkpoints.atomic_io import AtomicCheckpointIO
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.reports.result_table import format_metrics
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.training.notices import hide_notices
from lightning_softprompt.training.precision import keep_batches
from lightning_softprompt.training.python_config import python_config
from lightning_softprompt.training.run_outputs import RunOutputs, shorten_path
from lightning_softprompt.training.training_length import (
    default_patience,
    default_trainer_options,
    describe_default_length,
    is_unlimited,
)

TRAINER_DEFAULTS = {
    "logger": False,  # the run's own loggers are added
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the sampler of the data module returns each row once
}
WEIGHTS_ONLY = 4  # position of Lightning's `weights_only` among the further arguments of `fit`


class Trainer(lightning.pytorch.Trainer):
    """Lightning's Trainer for use from Python: this package's defaults, a progress bar and a run folder.

    `fit` writes `<folder>/<experiment>/<time-id>/` with checkpoints, `config.yaml`, `run.json`, `metrics.json`,
    `plots/` and the best prompt as `prompt.safetensors` with its model card. `softprompt test --ckpt_path` evaluates
    these checkpoints. What a config file cannot express, such as rows passed in Python, is listed in `run.json`. The
    command `softprompt fit` adds loggers and the guards of long runs.

    A training without `max_steps`, `max_epochs` or `max_time` ends after 10 epochs, or after 3 validations without an
    improvement (`RunSpec.early_stopping`).

    Args:
        run: Where the files of a training are written; None writes no files.
        options: Arguments of Lightning's Trainer, with the defaults in `TRAINER_DEFAULTS`.

    Attributes:
        prompt_path: The prompt file of the last `fit`; None if there is none.
    """

    def __init__(self, *, run: RunSpec | None = RunSpec(), **options: Any) -> None:  # noqa: B008 (a frozen value)
        callbacks = _as_list(options.get("callbacks"))
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        self._patience = default_patience(None if run is None else run.early_stopping, options)
        self._states_length = is_unlimited(options)
        self._options = {**TRAINER_DEFAULTS, **options, **default_trainer_options(options)}
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if options.get("enable_progress_bar") is not False and not has_bar:
            callbacks.append(StepProgressBar(write=rank_zero_info))
        with hide_notices():
            super().__init__(**{"enable_checkpointing": saves, **self._options, "callbacks": callbacks})
        self.run = run
        self.prompt_path: Path | None = None
        self._checkpoints: Mapping[str, Path] = {}  # of the last `fit`: `best` and `last`
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        keep_batches(self.strategy)

    def fit(self, model: Any, train_dataloaders: Any = None, *args: Any, **options: Any) -> None:
        """Trains a method, then saves the best prompt of the run.

        Args:
            model: The method.
            train_dataloaders: The data module, or loaders as Lightning takes them.
            args: Further arguments of Lightning's `fit`.
            options: Further arguments of Lightning's `fit`, such as `datamodule`.
        """
        if len(args) < WEIGHTS_ONLY:
            options.setdefault("weights_only", True)
        files = self._start_run(model, options.get("datamodule") or train_dataloaders)
        self.prompt_path = None
        added = [] if files is None else files.callbacks
        self.callbacks.extend(added)  # type: ignore[attr-defined]
        if train_dataloaders is not None:
            self.datamodule = None  # of an earlier call; Lightning sets it again if it is the second argument
        try:
            with hide_notices():
                super().fit(model, train_dataloaders, *args, **options)
        finally:
            for callback in added:
                self.callbacks.remove(callback)  # type: ignore[attr-defined]
        if files is not None and self.is_global_zero:
            self.prompt_path = files.write_prompt(self.limit_val_batches)
        if files is not None:
            self._checkpoints = files.checkpoints

    def _start_run(self, model: Any, data: Any) -> RunOutputs | None:
        """Creates the run folder of a training; None if the training writes no files."""
        is_ours = isinstance(model, SoftPromptModule) and isinstance(data, SoftPromptDataModule)
        if self.run is None or self.fast_dev_run or not is_ours:  # type: ignore[attr-defined]
            return None
        config = python_config(model, data, self.run, self._options)
        files = RunOutputs(self.run, data, config, self._patience, self.is_global_zero)
        if self._states_length:
            rank_zero_info(describe_default_length(self._patience))
        if isinstance(self.progress_bar_callback, StepProgressBar):
            self.progress_bar_callback.monitor = files.best.monitor
        return files

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Evaluates a method on the validation rows.

        Args:
            model: The method; None for that of the last call.
            dataloaders: The data module, or loaders as Lightning takes them.
            ckpt_path: A checkpoint whose parameters are used; `best` and `last` are those of the last `fit`.
            verbose: Whether to print the metrics.
            datamodule: The data module, if it is not the second argument.
            weights_only: How Lightning loads a checkpoint.

        Returns:
            The metrics, in a list with one element per loader.
        """
        arguments = (model, dataloaders, self._find_checkpoint(ckpt_path), False, datamodule, weights_only)
        with hide_notices(), self._loaders_only(dataloaders):
            results = super().validate(*arguments)
        return self._print_results("Validation", "val", results, verbose)

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Evaluates a method on the test rows; the arguments are those of `validate`."""
        arguments = (model, dataloaders, self._find_checkpoint(ckpt_path), False, datamodule, weights_only)
        with hide_notices(), self._loaders_only(dataloaders):
            results = super().test(*arguments)
        return self._print_results("Test", "test", results, verbose)

    def _print_results(
        self, title: str, stage: str, results: list[Mapping[str, float]], verbose: bool
    ) -> list[Mapping[str, float]]:
        if verbose and self.is_global_zero:
            print_results(title, stage, results)
        return results

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predicts rows.

        Args:
            model: The method; None for that of the last call.
            dataloaders: The data module, or loaders as Lightning takes them.
            datamodule: The data module, if it is not the second argument.
            return_predictions: Whether to return the records (default: True).
            ckpt_path: A checkpoint whose parameters are used; `best` and `last` are those of the last `fit`.
            weights_only: How Lightning loads a checkpoint.

        Returns:
            The records of each batch; with several loaders, a list of them for each loader.
        """
        checkpoint = self._find_checkpoint(ckpt_path)
        with hide_notices(), self._loaders_only(dataloaders):
            return super().predict(model, dataloaders, datamodule, return_predictions, checkpoint, weights_only)

    @property
    def learning_curve(self) -> Plot | None:
        """The learning curve of the last `fit`, which a notebook shows as an image; None if there is none."""
        if self.prompt_path is None:
            return None
        return Plot(self.prompt_path.with_name("plots") / "learning_curve.png")

    @contextmanager
    def _loaders_only(self, dataloaders: Any) -> Iterator[None]:
        """Detaches the data module of an earlier call from an evaluation that gets its own loaders.

        Otherwise Lightning would also set up the data module for the evaluation, for which it may have no rows.
        """
        data = self.datamodule
        uses_loaders = dataloaders is not None and not isinstance(dataloaders, LightningDataModule)
        if uses_loaders:
            self.datamodule = None
        try:
            yield
        finally:
            if uses_loaders:
                self.datamodule = data  # a prompt that is saved later has the row formats of the training

    def _find_checkpoint(self, path: str | Path | None) -> str | Path | None:
        checkpoint = self._checkpoints.get(str(path))
        return path if checkpoint is None else shorten_path(checkpoint)


@dataclass(frozen=True)
class Plot:
    """An image file that a notebook shows.

    Args:
        path: The file, in PNG format.
    """

    path: Path

    def __repr__(self) -> str:
        return f"Plot({shorten_path(self.path)})"

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


def print_results(title: str, stage: str, results: Sequence[Mapping[str, float]]) -> None:
    """Prints the metrics of an evaluation as the commands do, with their intervals.

    Args:
        title: The first word of the title.
        stage: The prefix of the names of metrics.
        results: The metrics of each loader.
    """
    for number, metrics in enumerate(results):
        loader = f", loader {number}" if len(results) > 1 else ""
        print(f"{title}{loader}\n{format_metrics(metrics, stage)}")


def _as_list(value: Callback | Sequence[Callback] | None) -> list[Callback]:
    if value is None:
        return []
    return [value] if isinstance(value, Callback) else list(value)
