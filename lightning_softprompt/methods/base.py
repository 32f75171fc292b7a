"""`SoftPromptModule`: what all methods share. Final but for `build`, `prompt`, `project` and `parameter_groups`."""

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
    advance,
    lower_on_plateau,
    monitor_of,
    optimizer_over,
    try_schedule,
    with_schedule,
)
from lightning_softprompt.objectives.base import Objective
from lightning_softprompt.objectives.by_task import ByTask
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.objectives.penalties import Penalty
from lightning_softprompt.prompts.dropout import dropped_out
from lightning_softprompt.readouts.base import Readout
from lightning_softprompt.readouts.by_task import ReadoutByTask
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.runs.loggers import is_logging_step

log = logging.getLogger(__name__)
Records = list[dict[str, Any]]


class TaskData(Protocol):
    """What a method reads from a data module: how its rows are answered and scored, and for which backbone."""

    spec: BackboneSpec

    @property
    def classes(self) -> Classes | None:
        """The classes and the words that stand for them, if the task has any."""

    @property
    def classes_by_task(self) -> Mapping[str, Classes | None] | None:
        """The same for each of several tasks, by name; None for a single task."""

    @property
    def evaluation(self) -> Evaluation:
        """How answers are scored."""


class SoftPromptModule(LightningModule, ABC):
    """A soft-prompt method on a frozen backbone.

    A method says what it trains (`build`) and which soft prompt a batch gets (`prompt`). It never sees the backbone's
    forward pass, the loss, the task or the answers. Methods are final: none subclasses another.

    Args:
        backbone: The frozen language model.
        objective: What training minimises; None takes `Classification` where there are classes, `LanguageModeling`
            elsewhere, and `ByTask` where there are several tasks.
        evaluation: How answers are scored; the data module gives it.
        readout: How class scores are read off the backbone.
        classes: How classes are spoken; the data module gives it.
        optimizer: Makes the optimizer; None takes AdamW without weight decay, at the method's own learning rate.
        scheduler: Makes the learning-rate schedule, advanced once a step, and ReduceLROnPlateau with each validation;
            None keeps the rate constant.
        penalty_weights: How much of each penalty that the method reports is added to the loss.
        penalties: Further terms of the loss, on soft tokens of any method.
        prompt_dropout: Share of the prompt's numbers that is dropped in training, drawn once a step for all rows.
        classes_by_task: Where there are several tasks, their names in the order of their numbers, each with how its
            classes are spoken if it has any; the data module gives it.
        data: In Python, the data module. `backbone`, `classes`, `classes_by_task` and `evaluation` are taken from it
            where they are not given.
    """

    trains = True  # whether there is anything to train
    trained = False  # whether it comes trained already
    default_rate = 0.005  # of AdamW, where no optimizer is given
    requires: ClassVar[tuple[Requirement, ...]] = ()  # of the backbone, in addition to what all methods need
    changes_backbone = False  # whether its weights are changed, as by the baselines

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
            raise ValueError(f"prompt_dropout must be from 0 to below 1, got {prompt_dropout}")
        save_plain_hyperparameters(self, currentframe(), leave_out=["evaluation", "data"])
        if data is not None:
            backbone = backbone or data.spec
            evaluation = evaluation or data.evaluation
            if classes is None and classes_by_task is None:
                classes, classes_by_task = data.classes, data.classes_by_task
            taken = {"backbone": backbone, "classes": classes, "classes_by_task": classes_by_task}
            self.hparams.update({name: to_plain(value) for name, value in taken.items()})
        self.spec = backbone or BackboneSpec()
        self._row_formats: Mapping[str, RowFormat] = getattr(data, "row_formats", {})
        self.backbone: Backbone | None = None
        self.readout: Readout | None = None
        self.objective = objective or _usual_objective(classes, classes_by_task)
        self.evaluations = nn.ModuleDict(
            {} if evaluation is None else {s: deepcopy(evaluation) for s in ("val", "test")}
        )
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})
        self.trained_readout: Mapping[str, Tensor] = {}  # of a method that comes trained, set by its `build`
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
        """The module of a checkpoint; of `SoftPromptModule` itself, whichever method it is.

        The checkpoint is never unpickled. It names only plug-ins of this package, PyTorch's optimizers and schedulers,
        and classes of the modules in `trust` and of the module that defines `cls`.

        Args:
            checkpoint_path: A run's checkpoint.
            map_location: Where its tensors go, as `torch.load` takes it.
            strict: Whether all tensors must be there; None takes the module's `strict_loading`.
            trust: Modules of further classes that the checkpoint may name.
            arguments: Arguments of the method that take precedence over the checkpoint's.

        Raises:
            ValueError: If the checkpoint is broken, names other classes, or belongs to another backbone or method.
        """
        arguments.pop("weights_only", None)  # always
        location = _default_map_location if map_location is None else map_location
        module, checkpoint = load_module(cls, checkpoint_path, trust, arguments, map_location=location)
        limit_build(module, checkpoint["state_dict"], checkpoint_path)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        tensors = checkpoint["state_dict"]
        load_tensors(module, tensors, checkpoint_path, module.strict_loading if strict is None else strict)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        return cast(Self, module.to(device))

    @abstractmethod
    def build(self, backbone: Backbone) -> None:
        """Makes the trainable parameters, in float32. The backbone's weights are there to be read."""

    @abstractmethod
    def prompt(self, batch: Batch) -> SoftPrompt:
        """The soft prompt of a batch. It may look at `batch.source`, `self.loaded.embed` and `batch.task_ids`."""

    def project(self) -> None:
        """Brings parameters back to where they may be; follows each step of the optimizer."""

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Trainable parameters in the optimizer's form; groups may have learning rates of their own."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @final
    def groups_with(self, name: str, parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Groups for two learning rates: these parameters, by a name, at `lr`; the rest at the optimizer's."""
        own = list(parameters)
        apart = {id(parameter) for parameter in own}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in apart]
        return [{"params": rest, "name": "prompt"}, {"params": own, "name": name, "lr": lr}]

    @final
    def check_backbone(self) -> None:
        """Tries the method's requirements on a small random copy of the backbone, so that a run is refused at once.

        Raises:
            ValueError: If there is no such backbone, or the method cannot use it.
        """
        require_of_copy((takes_soft_tokens, *self.requires), type(self).__name__, self.spec)

    @final
    def configure_model(self) -> None:
        """Loads the backbone once, then makes prompt and readout from the run's seed, whatever drew numbers before."""
        if self.backbone is not None:
            return
        spec = replace(self.spec, compute="plain") if self.changes_backbone else self.spec
        self.attach(load_backbone(spec_for_sharding(self, spec)))
        prepare_for_distributed(self, self.loaded)

    @final
    def attach(self, backbone: Backbone, seed: int | None = None) -> None:
        """Takes a backbone that is loaded already, instead of `configure_model`; starts from a seed, or the run's."""
        require(self.requires, type(self).__name__, backbone)
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() if seed is None else seed)
            self.build(backbone)
            self.readout = self._made_readout(backbone.codec)
            if self.readout is not None:
                self.readout.build(backbone)
                self._give_readout_what_it_learnt(self.readout)
        self.to(backbone.word_embeddings.device)

    def _made_readout(self, codec: Codec) -> Readout | None:
        if self.classes_by_task is not None:
            return ReadoutByTask(codec, self.classes_by_task, self._make_readout)
        return None if self.classes is None else self._make_readout(codec, self.classes)

    def _give_readout_what_it_learnt(self, readout: Readout) -> None:
        if not self.trained_readout:
            return
        if set(self.trained_readout) != set(readout.state_dict()):
            raise ValueError(
                f"the prompt was trained with a readout that has {sorted(self.trained_readout)}, and "
                f"{type(readout).__name__} has {sorted(readout.state_dict())}; set --model.readout to the former"
            )
        readout.load_state_dict(self.trained_readout)

    @final
    @torch.no_grad()
    def fold(self, task: int | None = None) -> SoftPrompt:
        """The prompt that every row gets, or every row of a task, without what makes it.

        Raises:
            ValueError: If rows get prompts of their own, or their embeddings are shifted.
        """
        training = self.training
        prompt = compute_shared_prompt(self.eval().prompt, self.loaded, task)
        self.train(training)
        return prompt

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their numbers, where there are several."""
        return tuple(self.classes_by_task or ())

    @property
    def row_formats(self) -> Mapping[str, RowFormat]:
        """How the rows of training are written, by task, as far as it is known."""
        return formats_of(self._trainer) or self._row_formats

    @final
    def remember_formats(self, formats: Mapping[str, RowFormat]) -> None:
        """Sets how rows are written for a method that was not trained in this process."""
        self._row_formats = formats

    @property
    def loaded(self) -> Backbone:
        """The backbone, which must be there by now."""
        assert self.backbone is not None, "configure_model has not run"
        return self.backbone

    @final
    def lm(self) -> PromptedLM:
        """The prompted language model of one step."""
        return PromptedLM(self.loaded, self._given, self.readout)

    def _given(self, batch: Batch) -> SoftPrompt:
        prompt = self.prompt(batch)
        return dropped_out(prompt, self.prompt_dropout) if self.training and self.prompt_dropout else prompt

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the targets [B, U, V]."""
        return self.lm()(batch)

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss; logs only on the Trainer's logging steps, since logging is slow.

        Of several processes the loss that is logged is that of all; its parts are the first one's.
        """
        logs = self.step(
            batch, done(self.trainer) if self.penalties else 0.0, global_loss_scale(self.objective.count(batch))
        )
        if is_logging_step(self.trainer, self.global_step + 1):
            loss = mean_over_processes(logs["loss"].detach(), self.loaded)
            told = {f"train/{name}": value.detach() for name, value in {**logs, "loss": loss}.items()}
            self.log_dict(told, batch_size=len(batch))
            self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(batch))
        return logs["loss"]

    @final
    def step(self, batch: Batch, done: float = 0.0, share: Tensor | float = 1.0) -> dict[str, Tensor]:
        """`loss`, objective and penalties together, and what else is worth logging.

        Args:
            batch: The rows.
            done: The share of training that is behind, from 0 to 1.
            share: How much the rows count beside those of other processes, on average 1.
        """
        lm = self.lm()
        outcome = self.objective(lm, batch)
        prompt = lm.prompt(batch)
        added = {penalty.name: penalty(lm, batch, done) for penalty in self.penalties}
        loss = outcome.loss * share + self._weighed(prompt.penalties) + sum(added.values())
        terms = {f"penalty/{name}": value for name, value in {**prompt.penalties, **added}.items()}
        return {"loss": loss, **outcome.logs, **terms, **prompt.logs}

    @final
    def check_prompt(self) -> None:
        """Refuses a prompt that never fits, and weights of penalties that the method does not report, before step 1.

        Raises:
            ValueError: If the soft tokens fill the backbone's window, or `penalty_weights` names an unknown penalty.
        """
        device = self.loaded.word_embeddings.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            try:
                prompt = self.prompt(random_batch(self.loaded, 2, TOKENS).to(device))
            except Exception as error:  # a method that needs more of a row: its first step shows what is wrong
                log.debug("the prompt of random rows was not checked: %s", error)
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

    def _weighed(self, penalties: Mapping[str, Tensor]) -> Tensor | float:
        self._check_penalties(penalties)
        return sum(weight * penalties[name] for name, weight in self.penalty_weights.items())

    @final
    def validation_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch; gives its records."""
        return self.score("val", batch)

    @final
    def test_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch; gives its records."""
        return self.score("test", batch)

    @final
    def predict_step(self, batch: Batch, batch_idx: int) -> Records:
        """What the model says: one record a row."""
        return self._records(batch, self._evaluation("test").predict(self.lm(), batch))

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs the pass."""
        metrics = self.metrics("val")
        self.log_dict(metrics, rank_zero_only=False)
        lower_on_plateau(self.trainer, metrics)

    @final
    def on_test_epoch_end(self) -> None:
        """Logs the pass."""
        self.log_dict(self.metrics("test"), rank_zero_only=False)

    @final
    def score(self, stage: str, batch: Batch, lm: PromptedLM | None = None) -> Records:
        """Takes a batch into the metrics of a stage; gives its records."""
        lm = lm or self.lm()
        self.losses[stage].update(self.objective(lm, batch).loss, len(batch))  # type: ignore[operator]
        return self._records(batch, self._evaluation(stage).update(lm, batch))

    def _evaluation(self, stage: str) -> Evaluation:
        if stage not in self.evaluations:
            raise ValueError("answers are to be scored, but no evaluation was given; the data module names one")
        return self.evaluations[stage]  # type: ignore[return-value]

    @staticmethod
    def _records(batch: Batch, records: Sequence[dict[str, Any] | None]) -> Records:
        """Those of the rows that were not left out, with the rows' numbers."""
        said = zip(batch.global_row_ids, records, strict=True)
        return [{"row": row, **record} for row, record in said if record is not None]

    @final
    def metrics(self, stage: str) -> dict[str, Tensor]:
        """The metrics of the pass, by stage and name."""
        metrics = {"loss": self.losses[stage].compute(), **self._evaluation(stage).compute()}  # type: ignore[operator]
        return {f"{stage}/{name}": value for name, value in metrics.items()}

    @final
    def on_validation_epoch_start(self) -> None:
        """Forgets the pass before, which callbacks may have read till now."""
        self.forget("val", self.current_epoch, drawn_rows(self.trainer.val_dataloaders))

    @final
    def on_test_epoch_start(self) -> None:
        """Forgets the pass before, which callbacks may have read till now."""
        self.forget("test", self.current_epoch, drawn_rows(self.trainer.test_dataloaders))

    @final
    def forget(self, stage: str, epoch: int, drawn: Sequence[Sequence[int]] | None = None) -> None:
        """Begins the metrics of a stage anew.

        Args:
            stage: `val` or `test`.
            epoch: The epoch.
            drawn: By task, the rows that are scored; None for all.
        """
        self.losses[stage].reset()  # type: ignore[operator]
        self._evaluation(stage).begin(stage, epoch)
        self._evaluation(stage).narrow(drawn)

    @final
    def configure_optimizers(self) -> Any:
        """The optimizer over the method's parameter groups, and its schedule, advanced once a step."""
        return self.optimizers_over(self.checked_groups(), [self.project])

    @final
    def checked_groups(self) -> list[dict[str, Any]]:
        """The method's parameter groups.

        Raises:
            ValueError: If there is nothing to train, or it is in half precision.
        """
        trainable = {name: parameter.dtype for name, parameter in self.named_parameters() if parameter.requires_grad}
        if halves := {name: dtype for name, dtype in trainable.items() if dtype.itemsize < torch.float32.itemsize}:
            raise ValueError(
                f"{', '.join(halves)} would be trained in {next(iter(halves.values()))} and not in float32; in half "
                f"precision small updates are lost. Set --trainer.precision to bf16-mixed or 32-true; the precision of "
                f"the frozen weights is --backbone.dtype"
            )
        groups = list(self.parameter_groups())
        if not any(group["params"] for group in groups):
            raise ValueError(f"{type(self).__name__} has nothing to train; use validate, test or predict with it")
        return groups

    @final
    def optimizers_over(self, groups: list[dict[str, Any]], after: Sequence[Callable[[], None]] = ()) -> Any:
        """Optimizer and schedule in Lightning's form.

        Args:
            groups: Of parameters.
            after: What follows each step of the optimizer.
        """
        optimizer = optimizer_over(self._make_optimizer, groups)
        for follow in after:
            optimizer.register_step_post_hook(lambda *_, follow=follow: follow())
        if self._make_scheduler is None:
            return optimizer
        return with_schedule(optimizer, self._make_scheduler)

    @final
    def watched_by_schedule(self) -> str | None:
        """The metric that the schedule watches, if it watches one, asked before anything is loaded.

        Raises:
            ValueError: If the optimizer cannot be made.
        """
        return monitor_of(self._make_optimizer, self._make_scheduler)

    @final
    def try_schedule(self, groups: Sequence[dict[str, Any]], steps: float | None) -> None:
        """Tries whether the schedule lasts as long as the training.

        Args:
            groups: The groups of parameters that are trained.
            steps: How many steps the training has, infinite where its end is open; None where that is not known.

        Raises:
            ValueError: Naming the step at which the schedule fails.
        """
        try_schedule(self._make_optimizer, self._make_scheduler, groups, steps)

    @final
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advances the schedule after a step; one that watches a metric advances at the end of a validation."""
        advance(scheduler)

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says which backbone the prompt belongs to, and which seed the run went by."""
        checkpoint[BACKBONE] = backbone_identity(self.loaded)
        checkpoint[SEED] = torch.initial_seed()
        if self.row_formats:
            checkpoint[ROWS] = plain_formats(self.row_formats)

    @final
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a prompt of another backbone, or a readout that was trained for other classes."""
        check_backbone(checkpoint.get(BACKBONE, {}), self.loaded, "the checkpoint")
        check_class_names(
            checkpoint.get("hyper_parameters", {}), checkpoint.get("state_dict", {}), self.hparams, "the checkpoint"
        )


def _usual_objective(classes: Classes | None, by_task: Mapping[str, Classes | None] | None) -> Objective:
    if by_task is not None:
        return ByTask()
    return LanguageModeling() if classes is None else Classification()


def formats_of(trainer: Any) -> Mapping[str, RowFormat]:
    """How the rows of a Trainer's data module are written, by task; empty without Trainer or data module."""
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "row_formats", {})


def plain_formats(formats: Mapping[str, RowFormat]) -> dict[str, Any]:
    """Formats of rows as plain values, for files."""
    return {task: to_plain(asdict(row_format)) for task, row_format in formats.items()}


def drawn_rows(loader: Any) -> Sequence[Sequence[int]] | None:
    """By task, the rows that a loader draws for a limited pass; None where it gives all, or is not the project's."""
    return getattr(getattr(loader, "batch_sampler", None), "drawn", None)


def done(trainer: Trainer) -> float:
    """The share of a training that is behind, from 0 to 1; 0 where its end is open."""
    total = trainer.estimated_stepping_batches
    return min(1.0, trainer.global_step / total) if total else 0.0
