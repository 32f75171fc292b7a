"""`SoftPromptModule`: base class of all methods, which override `build`, `prompt`, `project` and `parameter_groups`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from inspect import currentframe
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.saving import _default_map_location
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MeanMetric

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import (
    TOKENS,
    Requirement,
    require,
    require_of_copy,
    takes_soft_tokens,
)
from lightning_softprompt.backbones.skeleton import random_batch
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.checkpoints.class_names import check_class_names
from lightning_softprompt.checkpoints.folding import compute_shared_prompt
from lightning_softprompt.checkpoints.hyperparameters import save_plain_hyperparameters, to_plain
from lightning_softprompt.checkpoints.prompt_file import BACKBONE, ROWS, SEED, backbone_identity, check_backbone
from lightning_softprompt.checkpoints.restore import load_module, load_tensors
from lightning_softprompt.checkpoints.sizes import limit_build
from lightning_softprompt.checkpoints.state_dict_hooks import exclude_from_checkpoints
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch, Classes, SoftPrompt
from lightning_softprompt.distributed.sharding import (
    global_loss_scale,
    mean_over_processes,
    prepare_for_distributed,
    spec_for_sharding,
)
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.methods.optimizers import (
    advance_schedule,
    build_optimizer,
    build_schedule,
    find_monitor,
    step_plateau_schedules,
    try_schedule,
)
from lightning_softprompt.objectives.base import Objective
from lightning_softprompt.objectives.by_task import ByTask
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.objectives.penalties import Penalty
from lightning_softprompt.prompts.dropout import apply_dropout
from lightning_softprompt.readouts.base import Readout
from lightning_softprompt.readouts.by_task import ReadoutByTask
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.runs.loggers import is_logging_step

log = logging.getLogger(__name__)
Records = list[dict[str, Any]]
STAGES = ("val", "test")


class TaskData(Protocol):
    """The part of a data module that a method uses: task, evaluation and backbone."""

    spec: BackboneSpec

    @property
    def classes(self) -> Classes | None:
        """The classes and their label words, if the task has any."""

    @property
    def classes_by_task(self) -> Mapping[str, Classes | None] | None:
        """The classes of each of several tasks by name; None for a single task."""

    @property
    def evaluation(self) -> Evaluation:
        """How answers are scored."""


class SoftPromptModule(LightningModule, ABC):
    """A soft-prompt method on a frozen backbone.

    A method defines its trainable parameters (`build`) and the soft prompt of a batch (`prompt`). It does not see the
    backbone's forward pass, the loss, the task or the answers. Methods are final: none subclasses another.

    Args:
        backbone: The frozen language model.
        objective: Training loss (default: `Classification` for tasks with classes, `LanguageModeling` for text
            answers, `ByTask` for several tasks).
        evaluation: How answers are scored; set by the data module.
        readout: How class scores are computed from the backbone (label words, head, ranked candidates).
        classes: The classes and their label words; set by the data module.
        optimizer: Optimizer (default: AdamW without weight decay at the method's learning rate).
        scheduler: Learning-rate schedule, advanced once per step, `ReduceLROnPlateau` once per validation (default:
            constant rate).
        penalty_weights: Weights of the method's auxiliary losses, by name.
        penalties: Additional loss terms on the soft tokens, for any method.
        prompt_dropout: Dropout probability on prompt parameters (one mask per step, shared by the batch).
        classes_by_task: The classes of each of several tasks by name, None for a task without classes; set by the data
            module.
        data: In Python, the data module, which sets `backbone`, `classes`, `classes_by_task` and `evaluation` unless
            they are given.
    """

    trains = True  # whether the method has trainable parameters
    trained = False  # whether the method loads trained prompts
    default_rate = 0.005  # learning rate of AdamW if no optimizer is given
    requires: ClassVar[tuple[Requirement, ...]] = ()  # requirements of the backbone beyond those of all methods
    changes_backbone = False  # whether training changes the backbone's weights

    def __init__(
        self,
        backbone: BackboneSpec | None = None,
        objective: Objective | None = None,
        evaluation: Evaluation | None = None,
        readout: Callable[[Codec, Classes], Readout] = LabelWords,
        classes: Classes | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        penalty_weights: Mapping[str, float] | None = None,
        penalties: Sequence[Penalty] | None = None,
        prompt_dropout: float = 0.0,
        classes_by_task: Mapping[str, Classes | None] | None = None,
        data: TaskData | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= prompt_dropout < 1:
            raise ValueError(f"prompt_dropout must be at least 0 and below 1, got {prompt_dropout}")
        save_plain_hyperparameters(self, currentframe(), leave_out=["evaluation", "data"])
        if data is not None:
            backbone = backbone or data.spec
            evaluation = evaluation or data.evaluation
            if classes is None and classes_by_task is None:
                classes, classes_by_task = data.classes, data.classes_by_task
            from_data = {"backbone": backbone, "classes": classes, "classes_by_task": classes_by_task}
            self.hparams.update({name: to_plain(value) for name, value in from_data.items()})
        self.spec = backbone or BackboneSpec()
        self._row_formats: Mapping[str, RowFormat] = getattr(data, "row_formats", {})
        self.backbone: Backbone | None = None
        self.readout: Readout | None = None
        self.objective = objective or _default_objective(classes, classes_by_task)
        self.evaluations = nn.ModuleDict()
        if evaluation is not None:
            self.evaluations.update({stage: deepcopy(evaluation) for stage in STAGES})
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in STAGES})
        self.trained_readout: Mapping[str, Tensor] = {}  # set by the `build` of a method that loads a trained prompt
        self.classes = classes
        self.classes_by_task = classes_by_task
        self._make_readout = readout
        self._make_optimizer = optimizer or partial(AdamW, lr=self.default_rate, weight_decay=0.0)
        self._make_scheduler = scheduler
        self.penalty_weights = dict(penalty_weights or {})
        self.penalties = list(penalties or [])
        self.prompt_dropout = prompt_dropout
        exclude_from_checkpoints(self, "backbone")

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
        module, checkpoint = load_module(cls, checkpoint_path, trust, arguments, map_location=location)
        limit_build(module, checkpoint["state_dict"], checkpoint_path)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        tensors = checkpoint["state_dict"]
        is_strict = module.strict_loading if strict is None else strict
        load_tensors(module, tensors, checkpoint_path, is_strict)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        return cast(Self, module.to(device))

    @abstractmethod
    def build(self, backbone: Backbone) -> None:
        """Creates the trainable parameters in float32. The backbone is loaded, so that its weights can be read."""

    @abstractmethod
    def prompt(self, batch: Batch) -> SoftPrompt:
        """Computes the soft prompt of a batch. It may use `batch.source`, `batch.task_ids` and `self.loaded.embed`."""

    def project(self) -> None:
        """Projects parameters onto their constraint set, after each optimizer step."""

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Returns the optimizer's parameter groups. A group may set its learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @final
    def split_groups(self, name: str, parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Returns two parameter groups: the given parameters with rate `lr`, and the rest with the optimizer's rate."""
        selected = list(parameters)
        selected_ids = {id(parameter) for parameter in selected}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in selected_ids]
        return [{"params": rest, "name": "prompt"}, {"params": selected, "name": name, "lr": lr}]

    @final
    def check_backbone(self) -> None:
        """Checks the method's requirements on a small random copy of the backbone, before the weights are loaded.

        Raises:
            ValueError: If the backbone does not exist, or the method cannot use it.
        """
        require_of_copy((takes_soft_tokens, *self.requires), type(self).__name__, self.spec)

    @final
    def configure_model(self) -> None:
        """Loads the backbone once and creates prompt and readout, seeded by the run's seed alone."""
        if self.backbone is not None:
            return
        spec = replace(self.spec, linear_backend="plain") if self.changes_backbone else self.spec
        self.attach(load_backbone(spec_for_sharding(self, spec)))
        prepare_for_distributed(self, self.loaded)

    @final
    def attach(self, backbone: Backbone, seed: int | None = None) -> None:
        """Uses a loaded backbone instead of loading one in `configure_model`.

        Args:
            backbone: The backbone.
            seed: Seed of the initial parameters (default: the run's seed).
        """
        require(self.requires, type(self).__name__, backbone)
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() if seed is None else seed)
            self.build(backbone)
            self.readout = self._build_readout(backbone.codec)
            if self.readout is not None:
                self.readout.build(backbone)
                self._load_trained_readout(self.readout)
        self.to(backbone.word_embeddings.device)

    def _build_readout(self, codec: Codec) -> Readout | None:
        if self.classes_by_task is not None:
            return ReadoutByTask(codec, self.classes_by_task, self._make_readout)
        return None if self.classes is None else self._make_readout(codec, self.classes)

    def _load_trained_readout(self, readout: Readout) -> None:
        if not self.trained_readout:
            return
        if set(self.trained_readout) != set(readout.state_dict()):
            raise ValueError(
                f"the prompt was trained with a readout whose parameters are {sorted(self.trained_readout)}, but "
                f"{type(readout).__name__} has {sorted(readout.state_dict())}; set --model.readout to the readout of "
                f"training"
            )
        readout.load_state_dict(self.trained_readout)

    @final
    @torch.no_grad()
    def fold(self, task: int | None = None) -> SoftPrompt:
        """Returns the trained prompt as plain tensors, without its reparameterization network.

        Args:
            task: Index of the task, for a method with one prompt per task.

        Raises:
            ValueError: If the prompt depends on the row, or shifts the row's embeddings.
        """
        training = self.training
        prompt = compute_shared_prompt(self.eval().prompt, self.loaded, task)
        self.train(training)
        return prompt

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their ids; empty for a single task."""
        return tuple(self.classes_by_task or ())

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """Row formats of training by task, as far as they are known."""
        return formats_of(self._trainer) or self._row_formats

    @final
    def remember_formats(self, formats: Mapping[str, RowFormat]) -> None:
        """Sets the row formats of a method that was not trained in this process."""
        self._row_formats = formats

    @property
    def loaded(self) -> Backbone:
        """The backbone. It must have been loaded."""
        assert self.backbone is not None, "configure_model has not run"
        return self.backbone

    @final
    def lm(self) -> PromptedLM:
        """Returns the prompted language model for one step."""
        return PromptedLM(self.loaded, self._prompt_with_dropout, self.readout)

    def _prompt_with_dropout(self, batch: Batch) -> SoftPrompt:
        prompt = self.prompt(batch)
        if self.training and self.prompt_dropout:
            return apply_dropout(prompt, self.prompt_dropout)
        return prompt

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the targets [B, U, V]."""
        return self.lm()(batch)

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss. It is logged only at the Trainer's logging steps, because logging is slow.

        With several processes, the logged loss is the mean over all; its components are those of the first process.
        """
        progress = training_progress(self.trainer) if self.penalties else 0.0
        scale = global_loss_scale(self.objective.count(batch))
        logs = self.step(batch, progress, scale)
        if is_logging_step(self.trainer, self.global_step + 1):
            loss = mean_over_processes(logs["loss"].detach(), self.loaded)
            metrics = {f"train/{name}": value.detach() for name, value in {**logs, "loss": loss}.items()}
            self.log_dict(metrics, batch_size=len(batch))
            self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(batch))
        return logs["loss"]

    @final
    def step(self, batch: Batch, progress: float = 0.0, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        """Computes `loss`, the sum of objective and penalties, and further values to log.

        Args:
            batch: The rows.
            progress: Training progress in [0, 1].
            scale: Weight of this process's loss, so that the mean over ranks is the global mean.
        """
        lm = self.lm()
        outcome = self.objective(lm, batch)
        prompt = lm.prompt(batch)
        added = {penalty.name: penalty(lm, batch, progress) for penalty in self.penalties}
        loss = outcome.loss * scale + self._sum_method_penalties(prompt.penalties) + sum(added.values())
        terms = {f"penalty/{name}": value for name, value in {**prompt.penalties, **added}.items()}
        return {"loss": loss, **outcome.logs, **terms, **prompt.logs}

    @final
    def check_prompt(self) -> None:
        """Checks, before the first step, that the prompt fits and that `penalty_weights` names known penalties.

        Raises:
            ValueError: If the soft tokens fill the backbone's context window, or `penalty_weights` names an unknown
                penalty.
        """
        device = self.loaded.word_embeddings.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            try:
                prompt = self.prompt(random_batch(self.loaded, 2, TOKENS).to(device))
            except Exception as error:  # a method that needs real rows: its first step reports errors
                log.debug("could not check the prompt on random rows: %s", error)
                return
        blocks = [prompt.tokens, *prompt.hidden.values()]
        longest = max((block.shape[1] for block in blocks if block is not None), default=0)
        if longest:
            self.loaded.check_window(longest + 1)
        if self.training:
            self._check_penalties(prompt.penalties)

    def _check_penalties(self, penalties: Mapping[str, Tensor]) -> None:
        if unknown := sorted(set(self.penalty_weights) - set(penalties)):
            known = f"reports {sorted(penalties)}" if penalties else "reports none"
            raise ValueError(f"penalty_weights names {unknown}, but {type(self).__name__} {known}")

    def _sum_method_penalties(self, penalties: Mapping[str, Tensor]) -> Tensor | float:
        self._check_penalties(penalties)
        return sum(weight * penalties[name] for name, weight in self.penalty_weights.items())

    @final
    def validation_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch and returns its records."""
        return self.score("val", batch)

    @final
    def test_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch and returns its records."""
        return self.score("test", batch)

    @final
    def predict_step(self, batch: Batch, batch_idx: int) -> Records:
        """Returns the model's predictions, one record per row."""
        predictions = self._evaluation("test").predict(self.lm(), batch)
        return self._number_records(batch, predictions)

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the epoch."""
        metrics = self.compute_metrics("val")
        self.log_dict(metrics, rank_zero_only=False)
        step_plateau_schedules(self.trainer, metrics)

    @final
    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the epoch."""
        self.log_dict(self.compute_metrics("test"), rank_zero_only=False)

    @final
    def score(self, stage: str, batch: Batch, lm: PromptedLM | None = None) -> Records:
        """Adds a batch to the metrics of a stage and returns its records."""
        lm = lm or self.lm()
        self.losses[stage].update(self.objective(lm, batch).loss, len(batch))  # type: ignore[operator]
        records = self._evaluation(stage).update(lm, batch)
        return self._number_records(batch, records)

    def _evaluation(self, stage: str) -> Evaluation:
        if stage not in self.evaluations:
            raise ValueError("no evaluation: pass evaluation=data.evaluation to the method")
        return self.evaluations[stage]  # type: ignore[return-value]

    @staticmethod
    def _number_records(batch: Batch, records: Sequence[dict[str, Any] | None]) -> Records:
        """Adds the row ids to records. Rows that were skipped have the record None and are left out."""
        pairs = zip(batch.global_row_ids, records, strict=True)
        return [{"row": row, **record} for row, record in pairs if record is not None]

    @final
    def compute_metrics(self, stage: str) -> dict[str, Tensor]:
        """Computes the metrics of an epoch, named `<stage>/<metric>`."""
        loss = self.losses[stage].compute()  # type: ignore[operator]
        metrics = {"loss": loss, **self._evaluation(stage).compute()}
        return {f"{stage}/{name}": value for name, value in metrics.items()}

    @final
    def on_validation_epoch_start(self) -> None:
        """Resets the metrics of the previous epoch. Callbacks may read them until now."""
        self.reset_metrics("val", self.current_epoch, rows_of_limited_pass(self.trainer.val_dataloaders))

    @final
    def on_test_epoch_start(self) -> None:
        """Resets the metrics of the previous epoch. Callbacks may read them until now."""
        self.reset_metrics("test", self.current_epoch, rows_of_limited_pass(self.trainer.test_dataloaders))

    @final
    def reset_metrics(self, stage: str, epoch: int, drawn: Sequence[Sequence[int]] | None = None) -> None:
        """Resets the metrics of a stage.

        Args:
            stage: `val` or `test`.
            epoch: The epoch.
            drawn: Ids of the rows that are scored, for each task (default: all rows).
        """
        self.losses[stage].reset()  # type: ignore[operator]
        self._evaluation(stage).begin(stage, epoch)
        self._evaluation(stage).limit_rows(drawn)

    @final
    def configure_optimizers(self) -> Any:
        """Creates the optimizer of the method's parameter groups and its schedule, advanced once per step."""
        return self.build_optimizers(self.trainable_groups(), [self.project])

    @final
    def trainable_groups(self) -> list[dict[str, Any]]:
        """Returns the method's parameter groups after checking them.

        Raises:
            ValueError: If the method has no trainable parameters, or they are in half precision.
        """
        trainable = {name: parameter.dtype for name, parameter in self.named_parameters() if parameter.requires_grad}
        half = {name: dtype for name, dtype in trainable.items() if dtype.itemsize < torch.float32.itemsize}
        if half:
            dtype = next(iter(half.values()))
            raise ValueError(
                f"{', '.join(half)} would be trained in {dtype} instead of float32, and small updates would be lost. "
                f"Set --trainer.precision to bf16-mixed or 32-true; --backbone.dtype sets the precision of the frozen "
                f"weights"
            )
        groups = list(self.parameter_groups())
        if not any(group["params"] for group in groups):
            raise ValueError(f"{type(self).__name__} has nothing to train; use validate, test or predict with it")
        return groups

    @final
    def build_optimizers(self, groups: list[dict[str, Any]], after: Sequence[Callable[[], None]] = ()) -> Any:
        """Creates optimizer and schedule in Lightning's format.

        Args:
            groups: Parameter groups.
            after: Functions that are called after each optimizer step.
        """
        optimizer = build_optimizer(self._make_optimizer, groups)
        for follow in after:
            optimizer.register_step_post_hook(lambda *_, follow=follow: follow())
        if self._make_scheduler is None:
            return optimizer
        return build_schedule(optimizer, self._make_scheduler)

    @final
    def scheduler_monitor(self) -> str | None:
        """Returns the metric that the schedule monitors, if any. It is known before the backbone is loaded.

        Raises:
            ValueError: If the optimizer cannot be created.
        """
        return find_monitor(self._make_optimizer, self._make_scheduler)

    @final
    def try_schedule(self, groups: Sequence[dict[str, Any]], steps: float | None) -> None:
        """Runs the schedule for the length of the training, without training, to find errors early.

        Args:
            groups: Parameter groups.
            steps: Number of training steps; infinite if unbounded, None if unknown.

        Raises:
            ValueError: If the schedule fails, naming the step.
        """
        try_schedule(self._make_optimizer, self._make_scheduler, groups, steps)

    @final
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advances the schedule after a step. `ReduceLROnPlateau` advances at the end of a validation instead."""
        advance_schedule(scheduler)

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the identity of the backbone and the seed of the run."""
        checkpoint[BACKBONE] = backbone_identity(self.loaded)
        checkpoint[SEED] = torch.initial_seed()
        if self.row_formats:
            checkpoint[ROWS] = plain_formats(self.row_formats)

    @final
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a prompt of another backbone, and a readout that was trained for other classes."""
        check_backbone(checkpoint.get(BACKBONE, {}), self.loaded, "the checkpoint")
        arguments = checkpoint.get("hyper_parameters", {})
        check_class_names(arguments, checkpoint.get("state_dict", {}), self.hparams, "the checkpoint")


def _default_objective(classes: Classes | None, by_task: Mapping[str, Classes | None] | None) -> Objective:
    if by_task is not None:
        return ByTask()
    return LanguageModeling() if classes is None else Classification()


def formats_of(trainer: Any) -> Mapping[str, RowFormat]:
    """Returns the row formats of a Trainer's data module by task; empty without Trainer or data module."""
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "row_formats", {})


def plain_formats(formats: Mapping[str, RowFormat]) -> dict[str, Any]:
    """Returns row formats as plain values, for files."""
    return {task: to_plain(asdict(row_format)) for task, row_format in formats.items()}


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
