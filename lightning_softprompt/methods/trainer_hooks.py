"""`TrainerHooks`: what Lightning's Trainer calls, written once for a single method and for several replicas of one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.core.saving import _default_map_location
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import TOKENS
from lightning_softprompt.backbones.skeleton import random_batch
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity, check_backbone
from lightning_softprompt.checkpoints.checkpoint_file import SEED
from lightning_softprompt.checkpoints.class_names import check_class_names
from lightning_softprompt.checkpoints.initial_values import skip_initial_values
from lightning_softprompt.checkpoints.prompt_file import BACKBONE, READOUT, ROWS
from lightning_softprompt.checkpoints.restore import load_module, load_tensors
from lightning_softprompt.checkpoints.safe_loading.build_limits import limit_build
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.distributed.collectives import gather_objects
from lightning_softprompt.distributed.sharding import global_loss_scale, mean_over_processes
from lightning_softprompt.methods.optimizers import (
    OptimizerFactory,
    advance_schedule,
    count_training_steps,
    step_plateau_schedules,
    trainable_parameters,
)
from lightning_softprompt.methods.rollouts import Rollouts
from lightning_softprompt.methods.stage_metrics import Records, StageMetrics
from lightning_softprompt.methods.start_values import StartValues
from lightning_softprompt.methods.task_data import formats_of, plain_formats
from lightning_softprompt.objectives.training_loss import TrainingLoss
from lightning_softprompt.readouts.base import Readout
from lightning_softprompt.runs.loggers import is_logging_step

log = logging.getLogger(__name__)
START_VALUES = "start_values"  # key of a checkpoint: the trained values of each method at the start of the run
ROLLOUTS = "rollouts"  # key of a checkpoint: the incomplete rollout of each method, by process
OBJECTIVES = "objectives"  # key of a checkpoint: the values of each method's objective that change during training


class TrainedMethod(Protocol):
    """The part of a method that the hooks use."""

    training_loss: TrainingLoss
    optimizer_factory: OptimizerFactory
    stage_metrics: StageMetrics
    prompt_sources: Sequence[Path]
    start_values: StartValues
    rollouts: Rollouts
    readout: Readout | None

    @property
    def loaded(self) -> Backbone:
        """The backbone."""

    def prepare_step(self, batch: Batch) -> Batch:
        """Returns the rows that the next training step learns from."""

    def step(self, batch: Batch, progress: float = 0.0, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        """Computes `loss` and further values to log."""

    def lm(self) -> PromptedLM:
        """Returns the prompted language model for one step."""

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Computes the soft prompt of a batch."""

    def project(self) -> None:
        """Projects parameters onto their constraint set."""


class TrainerHooks(LightningModule, ABC):
    """Steps, metrics, optimizers and checkpoints of one or several methods, as the Trainer calls them.

    Subclasses define the methods and how a batch is scored. A method need not know this class: its contract is
    `SoftPromptModule`.
    """

    replica_names: Sequence[str] = ()  # names in logs and files; empty for a single method
    _row_formats: Mapping[str, RowFormat] = {}
    step_rows: list[Batch]  # the rows of the last training step of each method

    @property
    @abstractmethod
    def methods(self) -> Sequence[TrainedMethod]:
        """The methods that are trained: this one, or each replica."""

    @abstractmethod
    def score(self, stage: str, batch: Batch) -> Records:
        """Adds a batch to the metrics of a stage and returns its records."""

    @abstractmethod
    def compute_metrics(self, stage: str) -> dict[str, Any]:
        """Computes the metrics of an epoch, named `<stage>/<metric>`."""

    @abstractmethod
    def reset_metrics(self, stage: str, epoch: int, drawn: Sequence[Sequence[int]] | None = None) -> None:
        """Resets the metrics of a stage.

        Args:
            stage: `val`, `test` or `train_sample`.
            epoch: The epoch.
            drawn: Ids of the rows that are scored, for each task (default: all rows).
        """

    @abstractmethod
    def trainable_groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups of all methods after checking them."""

    @contextmanager
    def random_numbers_of(self, number: int) -> Iterator[None]:
        """Sets the random numbers of one of the methods within a `with` block (default: those of the run)."""
        yield

    def summarize(self, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the values to log for the values of each method."""
        return metrics[0]

    @property
    def loaded(self) -> Backbone:
        """The backbone. It must have been loaded."""
        return self.methods[0].loaded

    @property
    def steps_per_batch(self) -> int:
        """How often the loader of training rows returns each batch."""
        return self.methods[0].training_loss.objective.steps_per_batch

    @property
    def evaluations(self) -> nn.ModuleDict:
        """The evaluation of each stage, of the first method."""
        return self.methods[0].stage_metrics.evaluations

    @final
    def on_fit_start(self) -> None:
        """Stores the initial values for objectives that compare with them; those of a checkpoint remain."""
        for method in self.methods:
            if method.training_loss.objective.compares_with_start:
                method.start_values.remember()

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss, for several methods the sum, so that each has the gradient that it has alone.

        Values are logged only at the Trainer's logging steps, because logging is slow. With several processes, the
        logged loss is the mean over all; its components are those of the first process.
        """
        has_penalties = bool(self.methods[0].training_loss.penalties)
        progress = training_progress(self.trainer) if has_penalties else 0.0
        logs = []
        self.step_rows = []
        for number, method in enumerate(self.methods):
            with self.random_numbers_of(number):
                rows = method.prepare_step(batch)
                self.step_rows.append(rows)
                logs.append(self._step(method, rows, progress))
        if is_logging_step(self.trainer, self.global_step + 1):
            self._log_step(logs, len(batch))
        return torch.stack([values["loss"] for values in logs]).sum()

    def _step(self, method: TrainedMethod, rows: Batch, progress: float) -> dict[str, Tensor]:
        """Runs a step of one method, or skips it if its policy has changed too much since it sampled the answers."""
        rollouts, objective = method.rollouts, method.training_loss.objective
        skipped = {} if objective.max_policy_change is None else {"skipped": rows.mask.new_zeros((), dtype=torch.float)}
        if rollouts.is_stopped:
            return {"loss": zero_loss(method), **{name: value + 1 for name, value in skipped.items()}}
        values = method.step(rows, progress, global_loss_scale(objective.count(rows)))
        if skipped and rollouts.check(mean_over_processes(values["policy_change"], self.loaded)):
            return {**values, "loss": values["loss"] * 0, "skipped": skipped["skipped"] + 1}
        rollouts.has_learned = True
        return {**values, **skipped}

    @final
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Removes the gradients of methods whose steps were skipped, so that the optimizer does not change them."""
        for method in self.methods:
            if not method.rollouts.has_learned:
                for parameter in trainable_parameters(cast(nn.Module, method)).values():
                    parameter.grad = None
            method.rollouts.has_learned = False

    def _log_step(self, logs: Sequence[dict[str, Tensor]], rows: int) -> None:
        metrics = []
        for values in logs:
            loss = mean_over_processes(values["loss"].detach(), self.loaded)
            logged = {**values, "loss": loss}
            metrics.append({f"train/{name}": value.detach() for name, value in logged.items()})
        summary = self.summarize(metrics)
        self.log_dict(summary, batch_size=rows)
        self.log("loss", summary["train/loss"], prog_bar=True, logger=False, batch_size=rows)

    def validation_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch and returns its records."""
        return self.score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch and returns its records."""
        return self.score("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Records:
        """Returns the predictions of the first method, one record per row."""
        method = self.methods[0]
        return method.stage_metrics.predict(method.lm(), batch)

    @final
    def on_validation_epoch_start(self) -> None:
        """Resets the metrics of the previous epoch. Callbacks may read them until now."""
        self.reset_metrics("val", self.current_epoch, rows_of_limited_pass(self.trainer.val_dataloaders))

    @final
    def on_test_epoch_start(self) -> None:
        """Resets the metrics of the previous epoch. Callbacks may read them until now."""
        self.reset_metrics("test", self.current_epoch, rows_of_limited_pass(self.trainer.test_dataloaders))

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the epoch and advances the schedules that monitor one of them."""
        metrics = self.compute_metrics("val")
        self.log_dict(metrics, rank_zero_only=False)
        step_plateau_schedules(self.trainer, metrics)

    @final
    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the epoch."""
        self.log_dict(self.compute_metrics("test"), rank_zero_only=False)

    @final
    def configure_optimizers(self) -> Any:
        """Creates one optimizer over the parameter groups of all methods and its schedule, advanced once per step."""
        projections = [method.project for method in self.methods]
        factory = self.methods[0].optimizer_factory
        steps = count_training_steps(self.trainer) if factory.warmup_schedule else None
        return factory.build(self.trainable_groups(), steps, projections)

    @final
    def scheduler_monitor(self) -> str | None:
        """Returns the metric that the schedule monitors, if any. It is known before the backbone is loaded.

        Raises:
            ValueError: If the optimizer cannot be created.
        """
        return self.methods[0].optimizer_factory.find_monitor()

    @final
    def try_schedule(self, groups: Sequence[dict[str, Any]], steps: float | None) -> None:
        """Runs the schedule for the length of the training, without training, to find errors early.

        Args:
            groups: Parameter groups.
            steps: Number of training steps; infinite if unbounded, None if unknown.

        Raises:
            ValueError: If the schedule fails, naming the step.
        """
        self.methods[0].optimizer_factory.try_schedule(groups, steps)

    @final
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advances the schedule after a step. `ReduceLROnPlateau` advances at the end of a validation instead."""
        advance_schedule(scheduler)

    @final
    def check_prompt(self) -> None:
        """Checks, before the first step, that the prompt fits and that `penalty_weights` names known penalties.

        Raises:
            ValueError: If the soft tokens fill the backbone's context window, or `penalty_weights` names an unknown
                penalty.
        """
        method = self.methods[0]
        device = self.loaded.word_embeddings.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            try:
                prompt = method.prompt(random_batch(self.loaded, 2, TOKENS).to(device))
            except Exception as error:  # a method that needs real rows: its first step reports errors
                log.debug("could not check the prompt on random rows: %s", error)
                return
        blocks = [prompt.tokens, *prompt.hidden.values()]
        longest = max((block.shape[1] for block in blocks if block is not None), default=0)
        if longest:
            self.loaded.check_window(longest + 1)
        if self.training:
            method.training_loss.check_weights(prompt.penalties)

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """Row formats of training by task, as far as they are known."""
        data = getattr(self._trainer, "datamodule", None)
        return formats_of(data) or self._row_formats

    @final
    def remember_formats(self, formats: Mapping[str, RowFormat]) -> None:
        """Sets the row formats of a method that was not trained in this process."""
        self._row_formats = formats

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        strict: bool | None = None,
        trust: Iterable[str] = (),
        **arguments: Any,
    ) -> Self:
        """Loads a method from a checkpoint. Called on `SoftPromptModule`, it loads any method.

        No code in the checkpoint is executed. It may name only plug-ins of this package, optimizers and schedulers of
        PyTorch, and classes of the modules in `trust` and of the module that defines `cls`.

        Args:
            checkpoint_path: Checkpoint of a run.
            map_location: Device of the tensors, as in `torch.load`.
            strict: Whether all tensors are required (default: the module's `strict_loading`).
            trust: Modules whose classes the checkpoint may also name.
            arguments: Arguments of the method that replace those of the checkpoint.

        Raises:
            ValueError: If the checkpoint is damaged, names other classes, or belongs to another backbone or method.
        """
        arguments.pop("weights_only", None)  # it is always True here
        location = _default_map_location if map_location is None else map_location
        module, checkpoint = cls._read_checkpoint(checkpoint_path, trust, arguments, location)
        tensors = checkpoint["state_dict"]
        for method in module.methods:
            limit_build(method, tensors, checkpoint_path)
        with skip_initial_values():
            module.configure_model()
        module.on_load_checkpoint(checkpoint)
        is_strict = module.strict_loading if strict is None else strict
        load_tensors(module, tensors, checkpoint_path, is_strict)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        return module.to(device)

    @classmethod
    def _read_checkpoint(
        cls, path: str | Path, trust: Iterable[str], arguments: Mapping[str, Any], location: Any
    ) -> tuple[Self, dict[str, Any]]:
        """Returns the module of a checkpoint, before its backbone is loaded, and the checkpoint."""
        return load_module(cls, path, trust, arguments, map_location=location)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the identity of the backbone, the seed of the run, readout, row formats and any initial values."""
        checkpoint[BACKBONE] = backbone_identity(self.loaded)
        checkpoint[SEED] = torch.initial_seed()
        if self.methods[0].readout is not None:
            checkpoint[READOUT] = type(self.methods[0].readout).__name__
        if self.row_formats:
            checkpoint[ROWS] = plain_formats(self.row_formats)
        checkpoint[OBJECTIVES] = [method.training_loss.objective.state() for method in self.methods]
        if any(method.rollouts.turn for method in self.methods):
            checkpoint[ROLLOUTS] = gather_objects([method.rollouts.state() for method in self.methods])
        starts = [method.start_values.state() for method in self.methods]
        if any(starts):
            checkpoint[START_VALUES] = starts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a prompt of another backbone, and a readout that was trained for other classes."""
        check_backbone(checkpoint.get(BACKBONE, {}), self.loaded, "the checkpoint")
        arguments = checkpoint.get("hyper_parameters", {})
        check_class_names(arguments, checkpoint.get("state_dict", {}), self.hparams, "the checkpoint")
        for method, tensors in zip(self.methods, checkpoint.get(START_VALUES, ()), strict=False):
            method.start_values.set(tensors)
        for method, state in zip(self.methods, checkpoint.get(OBJECTIVES, ()), strict=False):
            method.training_loss.objective.load_state(state)
        if ROLLOUTS in checkpoint:
            self._load_rollouts(checkpoint[ROLLOUTS])

    def _load_rollouts(self, ranks: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Resumes in the middle of a rollout."""
        if self._trainer is None:
            return
        states = ranks[0]
        if len(ranks) == self.trainer.world_size:
            states = ranks[self.trainer.global_rank]
        else:
            log.warning(
                "The checkpoint has the answers of %d processes, not %d: new answers are sampled for the remaining "
                "steps of the rollout. Resume on the same number of processes for an exact resume",
                len(ranks), self.trainer.world_size,
            )  # fmt: skip
            states = [{**state, "rows": None} for state in states]
        for method, state in zip(self.methods, states, strict=True):
            method.rollouts.load_state(state)


def zero_loss(method: TrainedMethod) -> Tensor:
    """Returns a loss of 0 whose gradients are 0 for all trainable parameters."""
    parameters = trainable_parameters(cast(nn.Module, method)).values()
    return torch.stack([parameter.sum() for parameter in parameters]).sum() * 0


def rows_of_limited_pass(loader: Any) -> Sequence[Sequence[int]] | None:
    """Returns the ids of the rows that a loader samples for a limited pass, for each task.

    None if the loader uses all rows, or is not one of this package.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "drawn", None)


def training_progress(trainer: Trainer) -> float:
    """Training progress in [0, 1]; 0 if max steps is unbounded."""
    total = trainer.estimated_stepping_batches
    return min(1.0, trainer.global_step / total) if total else 0.0
