"""Several prompts of one method, trained in one run on the same batches over one backbone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.checkpoints.prompt_file import replica_name, replica_numbers
from lightning_softprompt.checkpoints.restore import load_module
from lightning_softprompt.checkpoints.roles import Roles
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.distributed.sharding import prepare_for_distributed, spec_for_sharding
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.methods.stage_metrics import Records
from lightning_softprompt.methods.trainer_hooks import TrainerHooks
from lightning_softprompt.prompts.init import Init

STREAMS = "replicas"  # key of a checkpoint: states of random numbers
RngStates = dict[int, tuple[Tensor, Tensor | None]]  # of the CPU and of a GPU, by replica


@dataclass(frozen=True)
class ReplicaSpec:
    """How the prompts of one run differ. All prompts share what no list sets.

    Args:
        count: K, the number of prompts.
        seeds: Seeds of the initial parameters and of dropout (default: the run's seed and the numbers after it).
        learning_rates: Learning rates of the parameter groups that set none.
        inits: Initial values, for methods with the argument `init`.
        ensemble: How validation and test also combine the prompts, for tasks with classes: `average` of their
            probabilities, or `vote` of their predictions (Lester et al. 2021, section 6), where the average decides
            between classes with equally many votes.

    Raises:
        ValueError: If a list does not have K values, or K is 1 and there is a list.
    """

    count: int = 1
    seeds: list[int] | None = None
    learning_rates: list[float] | None = None
    inits: list[Init] | None = None
    ensemble: Literal["average", "vote"] = "average"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"replicas.count must be at least 1, got {self.count}")
        lists = {"seeds": self.seeds, "learning_rates": self.learning_rates, "inits": self.inits}
        if self.count == 1 and any(lists.values()):
            raise ValueError("replicas.count is 1, so that nothing can differ; raise it, or leave the lists out")
        for name, values in lists.items():
            if values is not None and len(values) != self.count:
                raise ValueError(f"replicas.{name} must have {self.count} values, the count, got {len(values)}")


class Replicas(TrainerHooks):
    """K prompts of one method, each trained exactly as in a separate run.

    Each prompt has its own seed, loss, gradients and clipping. A step computes K times as much as that of one prompt;
    loading, data and the overhead of the Trainer are shared.

    Metrics are logged for each replica as `<metric>/<name>`, and as their mean and half the width of its 95 %
    confidence interval; for tasks with classes and reward heads also those of the ensemble as `<metric>/ensemble`.
    Records of rows and figures come from the first replica.

    Args:
        method: The method, before its backbone is loaded.
        spec: How the replicas differ.
    """

    def __init__(self, method: SoftPromptModule, spec: ReplicaSpec) -> None:
        super().__init__()
        if method.changes_backbone and spec.count > 1:
            raise ValueError(f"{type(method).__name__} changes the backbone, which replicas share; set replicas to 1")
        first_seed = torch.initial_seed()
        self.seeds = spec.seeds or [first_seed + k for k in range(spec.count)]
        self.rates: Sequence[float | None] = spec.learning_rates or [None] * spec.count
        self.replica_names = [replica_name(k) for k in range(spec.count)]
        copies = {str(k): deepcopy(method) for k in range(spec.count)}
        self.replicas = Roles(copies)
        for replica, init in zip(self.methods, spec.inits or [], strict=False):
            if not hasattr(replica, "init"):
                raise ValueError(
                    f"replicas.inits requires a method with the argument init, which {type(method).__name__} lacks"
                )
            replica.init = init  # type: ignore[assignment]
        self.save_hyperparameters({**method.hparams, "replicas": spec.count}, logger=False)
        scores_answers = method.scores_answers
        self.combine = mean if scores_answers else {"average": average, "vote": vote}[spec.ensemble]
        has_ensemble = spec.count > 1 and (scores_answers or method.classes is not None)
        evaluations = method.evaluations.items() if has_ensemble else ()
        self.ensembles = nn.ModuleDict({stage: deepcopy(evaluation) for stage, evaluation in evaluations})
        self._rng_states: RngStates = {}
        self._training_rng_states: RngStates = {}

    @classmethod
    def _read_checkpoint(
        cls, path: str | Path, trust: Iterable[str], arguments: Mapping[str, Any], location: Any
    ) -> tuple[Self, dict[str, Any]]:
        method, checkpoint = load_module(SoftPromptModule, path, trust, arguments, map_location=location)
        count = len(replica_numbers(checkpoint["state_dict"]))
        return cls(method, ReplicaSpec(max(1, count))), checkpoint

    @property
    def methods(self) -> Sequence[SoftPromptModule]:
        """The replicas."""
        return self.replicas.methods

    def current_prompt(self, batch: Batch | None = None, task: int | None = None) -> SoftPrompt:
        """Returns the current prompt of the first replica, see `SoftPromptModule.current_prompt`."""
        return self.methods[0].current_prompt(batch, task)

    @property
    def trains(self) -> bool:
        """Whether the method has trainable parameters."""
        return self.methods[0].trains

    @property
    def trained(self) -> bool:
        """Whether the method loads trained prompts."""
        return self.methods[0].trained

    def configure_model(self) -> None:
        """Loads the backbone once, then creates each prompt from its own seed."""
        if self.methods[0].backbone is not None:
            return
        backbone = load_backbone(spec_for_sharding(self, self.methods[0].spec))
        self.replicas.attach(backbone, self.seeds)
        prepare_for_distributed(self, backbone)

    @contextmanager
    def random_numbers_of(self, number: int) -> Iterator[None]:
        """Sets the random numbers that a replica draws in a separate run."""
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):
            if number not in self._rng_states:
                torch.manual_seed(self.seeds[number])
            else:
                cpu_state, gpu_state = self._rng_states[number]
                torch.set_rng_state(cpu_state)
                if gpu_state is not None:
                    torch.cuda.set_rng_state(gpu_state, self.device)
            yield
            gpu_state = torch.cuda.get_rng_state(self.device) if on_gpu else None
            self._rng_states[number] = torch.get_rng_state(), gpu_state

    def summarize(self, metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Returns mean, half the width of its confidence interval, and the value of each replica, by metric.

        Metrics that a replica lacks are left out: the share of new bigrams is undefined for answers of one word.
        """
        summary: dict[str, float] = {}
        common = [name for name in metrics[0] if all(name in values for values in metrics)]
        for name in common:
            values = [float(of_replica[name]) for of_replica in metrics]
            summary[name], half_width = student_interval(values)
            if len(values) > 1:
                summary[f"{name}/interval"] = half_width
            for replica, value in zip(self.replica_names, values, strict=True):
                summary[f"{name}/{replica}"] = value
        return summary

    def score(self, stage: str, batch: Batch) -> Records:
        """Adds a batch to the metrics of each replica and of the ensemble; returns the records of the first replica."""
        lms = [replica.lm() for replica in self.methods]
        records = []
        for k, (replica, lm) in enumerate(zip(self.methods, lms, strict=True)):
            with self.random_numbers_of(k):
                records.append(replica.score(stage, batch, lm))
        if stage in self.ensembles:
            ensemble = lms[0].with_readout(lambda _, rows: self.combine([lm.scores(rows) for lm in lms]))
            cast(Evaluation, self.ensembles[stage]).update(ensemble, batch)
        return records[0]

    def reset_metrics(self, stage: str, epoch: int, drawn: Sequence[Sequence[int]] | None = None) -> None:
        """Resets the metrics of a stage and remembers the random numbers of training."""
        self._training_rng_states = dict(self._rng_states)
        for replica in self.methods:
            replica.reset_metrics(stage, epoch, drawn)
        if stage in self.ensembles:
            cast(Evaluation, self.ensembles[stage]).reset()

    def compute_metrics(self, stage: str) -> dict[str, Any]:
        """Computes the metrics of an epoch and restores the random numbers of training."""
        self._rng_states = self._training_rng_states
        by_replica = [replica.compute_metrics(stage) for replica in self.methods]
        metrics: dict[str, Any] = self.summarize(by_replica)
        if stage in self.ensembles:
            of_ensemble = cast(Evaluation, self.ensembles[stage]).compute()
            metrics |= {f"{stage}/{name}/ensemble": value for name, value in of_ensemble.items()}
        return metrics

    def trainable_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of all replicas. No optimizer in use combines values of different groups."""
        groups = []
        for replica, rate, name in zip(self.methods, self.rates, self.replica_names, strict=True):
            default = {} if rate is None else {"lr": rate}
            for number, group in enumerate(replica.trainable_groups()):
                groups.append({**default, **group, "name": f"{name}/{group.get('name', number)}"})
        return groups

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the gradients of each replica separately."""
        if not gradient_clip_val:
            return
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for replica in self.methods:
            clip(trainable_parameters(replica).values(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the states of the random numbers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STREAMS] = self._rng_states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses prompts of another backbone; restores the states of the random numbers."""
        super().on_load_checkpoint(checkpoint)
        self._rng_states = {}
        for number, (cpu_state, gpu_state) in checkpoint[STREAMS].items():
            self._rng_states[number] = cpu_state.cpu(), None if gpu_state is None else gpu_state.cpu()


def average(scores: Sequence[Tensor]) -> Tensor:
    """Scores [B, C] whose softmax is the mean of the probabilities of the prompts."""
    probabilities = [prompt_scores.softmax(-1) for prompt_scores in scores]
    return torch.stack(probabilities).mean(0).log()


def mean(scores: Sequence[Tensor]) -> Tensor:
    """Mean scores [B] of answers."""
    return torch.stack(list(scores)).mean(0)


def vote(scores: Sequence[Tensor]) -> Tensor:
    """Scores [B, C] that order classes by their number of votes, and equal numbers by their mean probability."""
    num_classes = scores[0].shape[-1]
    choices = [prompt_scores.argmax(-1) for prompt_scores in scores]
    votes = torch.stack([nn.functional.one_hot(choice, num_classes) for choice in choices])
    return votes.sum(0) + average(scores).exp()
