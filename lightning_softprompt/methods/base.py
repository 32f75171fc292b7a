"""`SoftPromptModule`: base class of all methods, which override `build`, `prompt`, `project` and `parameter_groups`.

What the Trainer calls (steps, metrics, optimizers and checkpoints) is inherited from `TrainerHooks`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import currentframe
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement, require, require_of_copy, takes_soft_tokens
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.checkpoints.folding import compute_shared_prompt
from lightning_softprompt.checkpoints.hyperparameters import class_of, save_plain_hyperparameters, to_plain
from lightning_softprompt.checkpoints.initial_values import skip_initial_values
from lightning_softprompt.checkpoints.prompt_sources import collect_sources
from lightning_softprompt.checkpoints.state_dict_hooks import exclude_from_checkpoints
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch, Classes, SoftPrompt
from lightning_softprompt.distributed.sharding import prepare_for_distributed, spec_for_sharding
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.methods.optimizers import (
    OptimizerFactory,
    check_trainable,
    separate_group,
    trainable_parameters,
)
from lightning_softprompt.methods.rollouts import Rollouts
from lightning_softprompt.methods.schedules import make_warmup_schedule
from lightning_softprompt.methods.stage_metrics import Records, StageMetrics
from lightning_softprompt.methods.start_values import StartValues
from lightning_softprompt.methods.task_data import TaskData, formats_of
from lightning_softprompt.methods.trainer_hooks import TrainerHooks
from lightning_softprompt.objectives.base import Objective
from lightning_softprompt.objectives.by_task import default_objective
from lightning_softprompt.objectives.penalties import Penalty
from lightning_softprompt.objectives.training_loss import TrainingLoss
from lightning_softprompt.prompts.dropout import add_embedding_noise, apply_dropout, embedding_noise
from lightning_softprompt.readouts.base import Readout, load_trained
from lightning_softprompt.readouts.by_task import build_readout
from lightning_softprompt.readouts.default import default_readout


class SoftPromptModule(TrainerHooks):
    """A soft-prompt method on a frozen backbone.

    A method defines its trainable parameters (`build`) and the soft prompt of a batch (`prompt`). It does not see the
    backbone's forward pass, the loss, the task or the answers. Methods are final: none subclasses another.

    Args:
        backbone: The frozen language model.
        objective: Training loss (default: `Classification` for tasks with classes, `LanguageModeling` for text
            answers, `ByTask` for several tasks).
        evaluation: How answers are scored; set by the data module.
        readout: How class scores are computed from the backbone (default: `LabelWords`, or `RankedChoices` if a label
            word has several tokens).
        classes: The classes and their label words; set by the data module.
        lr: Learning rate (default: that of the method). It replaces the rate of `optimizer`, but not the rate of a
            parameter group with a separate option, such as `update_lr` of DePT.
        lr_schedule: Learning rate over the training: `constant`, or a decay to zero that is `linear` or `cosine`.
        warmup: Steps in which the learning rate rises linearly from zero, or their share of the training if below 1.
        optimizer: Optimizer (default: AdamW without weight decay).
        scheduler: Learning-rate schedule in place of `lr_schedule` and `warmup`, advanced once per step,
            `ReduceLROnPlateau` once per validation.
        penalty_weights: Weights of the method's auxiliary losses, by name.
        penalties: One or several additional loss terms on the soft tokens, for any method.
        prompt_dropout: Dropout probability on prompt parameters (one mask per step, shared by the batch).
        embedding_noise: Scale alpha of uniform noise on the embeddings of the input tokens in training (NEFTune);
            5 to 15 in the paper, 0 for none.
        classes_by_task: The classes of each of several tasks by name, None for a task without classes; set by the data
            module.
        data: In Python, the data module, which sets `backbone`, `classes`, `classes_by_task` and `evaluation` unless
            they are given.
    """

    trains = True  # whether the method has trainable parameters
    trained = False  # whether the method loads trained prompts
    default_rate = 0.005  # learning rate of AdamW if no optimizer is given
    default_penalty_weights: ClassVar[Mapping[str, float]] = {}  # weights of the method's penalties if none are given
    requires: tuple[Requirement, ...] = ()  # requirements of the backbone beyond those of all methods
    changes_backbone = False  # whether training changes the backbone's weights

    @property
    def changes_layers(self) -> bool:
        """Whether training changes the linear layers, whose products then cannot use packed weights."""
        return self.changes_backbone

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
        return [{"params": list(trainable_parameters(self).values())}]

    @final
    def split_groups(self, name: str, parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Returns two parameter groups: the given parameters with rate `lr`, and the rest with the optimizer's rate."""
        selected = list(parameters)
        selected_ids = {id(parameter) for parameter in selected}
        rest = [p for p in trainable_parameters(self).values() if id(p) not in selected_ids]
        return [{"params": rest, "name": "prompt"}, {"params": selected, "name": name, "lr": lr}]

    def __init__(
        self,
        backbone: BackboneSpec | None = None,
        objective: Objective | None = None,
        evaluation: Evaluation | None = None,
        readout: Callable[[Codec, Classes], Readout] | None = None,
        classes: Classes | None = None,
        lr: float | None = None,
        lr_schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        penalty_weights: Mapping[str, float] | None = None,
        penalties: Penalty | Sequence[Penalty] | None = None,
        prompt_dropout: float = 0.0,
        embedding_noise: float = 0.0,
        classes_by_task: Mapping[str, Classes | None] | None = None,
        data: TaskData | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= prompt_dropout < 1:
            raise ValueError(f"prompt_dropout must be at least 0 and below 1, got {prompt_dropout}")
        if not 0 <= embedding_noise < math.inf:
            raise ValueError(f"embedding_noise must be a finite number of at least 0, got {embedding_noise}")
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"lr must be a finite number above 0, got {lr}")
        save_plain_hyperparameters(self, currentframe(), leave_out=["evaluation", "data"])
        if data is not None:
            backbone = backbone or data.spec
            evaluation = evaluation or data.evaluation
            if classes is None and classes_by_task is None:
                classes, classes_by_task = data.classes, data.classes_by_task
            from_data = {"backbone": backbone, "classes": classes, "classes_by_task": classes_by_task}
            self.hparams.update({name: to_plain(value) for name, value in from_data.items()})
        self.spec = backbone or BackboneSpec()
        self.backbone: Backbone | None = None
        self.readout: Readout | None = None
        self.trained_readout: Mapping[str, Tensor] = {}  # set by the `build` of a method that loads a trained prompt
        self.has_trained_values = False  # whether a file replaces the initial values, which are then not computed
        self.prompt_sources: Sequence[Path] = ()  # files from which `build` reads trained parameters
        self.classes = classes
        self.classes_by_task = classes_by_task
        self.prompt_dropout = prompt_dropout
        self.embedding_noise = embedding_noise
        self.training_loss = TrainingLoss(
            objective or default_objective(classes, classes_by_task),
            dict(penalty_weights or self.default_penalty_weights),
            [penalties] if isinstance(penalties, Penalty) else list(penalties or []),
            type(self).__name__,
        )
        self.stage_metrics = StageMetrics(evaluation, self.objective.has_data_loss)
        self.start_values = StartValues(self)
        self.rollouts = Rollouts(self.objective)
        make_optimizer = optimizer or partial(AdamW, lr=self.default_rate, weight_decay=0.0)
        if scheduler is not None and (lr_schedule != "constant" or warmup):
            raise ValueError("scheduler replaces lr_schedule and warmup; set either scheduler or those two")
        schedule = make_warmup_schedule(lr_schedule, warmup)
        self.optimizer_factory = OptimizerFactory(make_optimizer, scheduler, lr, schedule)
        self._make_readout = readout or default_readout
        self.remember_formats(formats_of(data))
        exclude_from_checkpoints(self, "backbone")

    @final
    def check_backbone(self) -> None:
        """Checks the method's requirements on a small random copy of the backbone, before the weights are loaded.

        Raises:
            ValueError: If the backbone does not exist, or the method cannot use it or the objective.
        """
        self._check_objective()
        require_of_copy((takes_soft_tokens, *self.requires), type(self).__name__, self.spec)

    def _check_objective(self) -> None:
        options = {"prompt_dropout": self.prompt_dropout, "embedding_noise": self.embedding_noise}
        noise = [name for name, value in options.items() if value]
        self.objective.check_method(type(self).__name__, self.changes_backbone, noise)
        if self.objective.requires_values and not self.scores_tokens:
            raise ValueError(
                f"{type(self.objective).__name__} requires a value of each token; set --model.readout to ValueHead"
            )

    @final
    def configure_model(self) -> None:
        """Loads the backbone once and creates prompt and readout, seeded by the run's seed alone."""
        if self.backbone is not None:
            return
        spec = replace(self.spec, linear_backend="plain") if self.changes_layers else self.spec
        self.attach(load_backbone(spec_for_sharding(self, spec)))
        prepare_for_distributed(self, self.loaded)

    @final
    def attach(self, backbone: Backbone, seed: int | None = None) -> None:
        """Uses a loaded backbone instead of loading one in `configure_model`.

        Args:
            backbone: The backbone.
            seed: Seed of the initial parameters (default: the run's seed).
        """
        self._check_objective()
        require(self.requires, type(self).__name__, backbone)
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() if seed is None else seed)
            with collect_sources() as self.prompt_sources, skip_initial_values(self.has_trained_values):
                self.build(backbone)
            self.readout = build_readout(self._make_readout, backbone.codec, self.classes, self.classes_by_task)
            if self.readout is not None:
                self.readout.build(backbone)
                load_trained(self.readout, self.trained_readout)
        self.to(backbone.word_embeddings.device)

    @final
    def build_on(self, backbone: Backbone) -> None:
        """Creates the parameters as a part of another method, to which the backbone belongs."""
        self.__dict__["backbone"] = backbone  # not as a child: its weights would also be parameters of this part
        self.build(backbone)

    @property
    def loaded(self) -> Backbone:
        """The backbone. It must have been loaded."""
        assert self.backbone is not None, "configure_model has not run"
        return self.backbone

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their ids; empty for a single task."""
        return tuple(self.classes_by_task or ())

    @property
    def scores_answers(self) -> bool:
        """Whether the readout scores answers. It is known before the backbone is loaded."""
        return bool(getattr(class_of(self._make_readout), "scores_answers", False))

    @property
    def scores_tokens(self) -> bool:
        """Whether the readout computes a value for each token. It is known before the backbone is loaded."""
        return bool(getattr(class_of(self._make_readout), "scores_tokens", False))

    @property
    def objective(self) -> Objective:
        """The objective of the training loss."""
        return self.training_loss.objective

    @final
    def lm(self) -> PromptedLM:
        """Returns the prompted language model for one step."""
        return PromptedLM(self.loaded, self.prompt_with_dropout, self.readout, start=self.start_values.restore)

    @final
    def prompt_with_dropout(self, batch: Batch) -> SoftPrompt:
        """Computes the soft prompt of a batch, with dropout and noise on the embeddings in training."""
        prompt = self.prompt(batch)
        if self.training and self.prompt_dropout:
            prompt = apply_dropout(prompt, self.prompt_dropout)
        if self.training and self.embedding_noise:
            size, seed = self.loaded.hidden_size, torch.initial_seed()
            noise = embedding_noise(batch, size, self.embedding_noise, seed, self.current_epoch)
            prompt = add_embedding_noise(prompt, noise)
        return prompt

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the targets [B, U, V]."""
        return self.lm()(batch)

    def merge(self) -> None:
        """Writes the trained weights of the backbone into its model, which a plain model of transformers then equals.

        Raises:
            ValueError: If the method does not change weights of the backbone.
        """
        raise ValueError(
            f"{type(self).__name__} does not change weights of the backbone; export the prompt with softprompt fold"
        )

    @final
    @torch.no_grad()
    def fold(self, task: int | None = None) -> SoftPrompt:
        """Returns the trained prompt as plain tensors, without its reparameterization network.

        Args:
            task: Index of the task, for a method with one prompt per task.

        Raises:
            ValueError: If the prompt depends on the row, or shifts the row's embeddings, or the method changes weights
                of the backbone.
        """
        if self.changes_backbone:
            raise ValueError(
                f"{type(self).__name__} cannot be folded: it changes weights of the backbone, which a folded "
                "prompt does not contain; write the changed backbone with softprompt merge"
            )
        training = self.training
        prompt = compute_shared_prompt(self.eval().prompt, self.loaded, task)
        self.train(training)
        return prompt

    @final
    @torch.no_grad()
    def current_prompt(self, batch: Batch | None = None, task: int | None = None) -> SoftPrompt:
        """Returns the soft prompt at this point of a training, without dropout and without gradient.

        Callbacks use it. The mode of the module and the random state are not changed.

        Args:
            batch: Rows of the prompt; None if the prompt is the same for every row.
            task: Index of the task if there is no batch, for a method with one prompt per task.

        Raises:
            ValueError: If there is no batch, and the prompt depends on the row.
        """
        training, device = self.training, self.loaded.word_embeddings.device
        self.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                if batch is not None:
                    return self.prompt(self.loaded.prompt_view(batch))
                return compute_shared_prompt(self.prompt, self.loaded, task)
        except ValueError as error:
            if batch is not None:
                raise
            raise ValueError(f"{type(self).__name__} requires rows, current_prompt(batch): {error}") from error
        finally:
            self.train(training)

    @property
    def methods(self) -> Sequence[Self]:
        """This method alone."""
        return (self,)

    @final
    def prepare_step(self, batch: Batch) -> Batch:
        """Returns the rows that the next training step learns from: the batch, or answers that are sampled for it."""
        return self.rollouts.next(self.lm(), batch)

    @final
    def step(self, batch: Batch, progress: float = 0.0, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        """Computes `loss`, the sum of objective and penalties, and further values to log.

        Args:
            batch: The rows.
            progress: Training progress in [0, 1].
            scale: Weight of this process's loss, so that the mean over ranks is the global mean.
        """
        return self.training_loss(self.lm(), batch, progress, scale)

    @final
    def score(self, stage: str, batch: Batch, lm: PromptedLM | None = None) -> Records:
        """Adds a batch to the metrics of a stage and returns its records."""
        return self.stage_metrics.update(stage, self.objective, lm or self.lm(), batch)

    @final
    def compute_metrics(self, stage: str) -> dict[str, Tensor]:
        """Computes the metrics of an epoch, named `<stage>/<metric>`."""
        return self.stage_metrics.compute(stage)

    @final
    def reset_metrics(self, stage: str, epoch: int, drawn: Sequence[Sequence[int]] | None = None) -> None:
        """Resets the metrics of a stage; `drawn` are the ids of the rows that are scored (default: all rows)."""
        self.stage_metrics.reset(stage, epoch, drawn)

    @final
    def trainable_groups(self) -> list[dict[str, Any]]:
        """Returns the method's parameter groups after checking them.

        Raises:
            ValueError: If the method has no trainable parameters, or they are in half precision.
        """
        groups = list(self.parameter_groups())
        if self.readout is not None and self.readout.lr is not None:
            groups = separate_group(groups, "readout", self.readout.parameters(), self.readout.lr)
        check_trainable(self, groups)
        return groups
