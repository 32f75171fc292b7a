"""Several prompts of one method, trained in one run on the same batches over one backbone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self, cast

import torch
from lightning import LightningModule
from lightning.pytorch.core.saving import _default_map_location
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.checkpoints.prompt_file import ROWS, replica_numbers
from lightning_softprompt.checkpoints.restore import load_module, load_tensors
from lightning_softprompt.checkpoints.sizes import limit_build
from lightning_softprompt.checkpoints.state_dict_hooks import exclude_from_checkpoints
from lightning_softprompt.core.types import Batch
from lightning_softprompt.distributed.sharding import (
    global_loss_scale,
    mean_over_processes,
    prepare_for_distributed,
    spec_for_sharding,
)
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.methods.base import (
    Records,
    SoftPromptModule,
    formats_of,
    plain_formats,
    rows_of_limited_pass,
    training_progress,
)
from lightning_softprompt.methods.optimizers import advance_schedule, step_plateau_schedules
from lightning_softprompt.prompts.init import Init
from lightning_softprompt.runs.loggers import is_logging_step

STREAMS = "replicas"  # key of a checkpoint: states of random numbers


@dataclass(frozen=True)
class ReplicaSpec:
    """How the prompts of one run differ. Lists that are not given are alike for all.

    Args:
        count: K, prompts.
        seeds: Of their starts and of what they draw; None counts up from the run's seed.
        learning_rates: Of the parameters that have none of their own.
        inits: Where they start, for methods with an `init`.
        ensemble: How validation and test put the prompts together, too, where there are classes: `average` of their
            probabilities, or `vote` of their predictions (Lester et al. 2021, section 6), ties going to the average.

    Raises:
        ValueError: If a list is not of K, or K is 1 and there is one.
    """

    count: int = 1
    seeds: list[int] | None = None
    learning_rates: list[float] | None = None
    inits: list[Init] | None = None
    ensemble: Literal["average", "vote"] = "average"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"replicas.count must be at least 1, got {self.count}")
        if self.count == 1 and (self.seeds or self.learning_rates or self.inits):
            raise ValueError("replicas.count is 1, so that nothing can differ; raise it, or leave the lists out")
        for name in ("seeds", "learning_rates", "inits"):
            values = getattr(self, name)
            if values is not None and len(values) != self.count:
                raise ValueError(f"replicas.{name} must be {self.count}, as count says, got {len(values)}")


class Replicas(LightningModule):
    """K prompts of one method, each trained exactly as if alone: with its own seed, loss, gradients and clipping.

    The arithmetic is K times that of one run. What is saved is loading, data, the Trainer's overhead and the keeping
    of books: metrics are logged for each replica as `<metric>/<name>`, and as mean and half of its 95 % interval; where
    there are classes, those of all prompts together as `<metric>/ensemble`. Records of rows and figures are the first
    replica's.

    Args:
        method: What is trained, before it is built.
        spec: How the replicas differ.
    """

    def __init__(self, method: SoftPromptModule, spec: ReplicaSpec) -> None:
        super().__init__()
        if method.changes_backbone and spec.count > 1:
            raise ValueError(f"{type(method).__name__} changes the backbone, which replicas share; set replicas to 1")
        first = torch.initial_seed()
        self.seeds = spec.seeds or [first + k for k in range(spec.count)]
        self.rates: Sequence[float | None] = spec.learning_rates or [None] * spec.count
        self.names = [f"replica_{k + 1}" for k in range(spec.count)]
        self.replicas = nn.ModuleList(deepcopy(method) for _ in range(spec.count))
        for replica, init in zip(self._each, spec.inits or [], strict=False):
            if not hasattr(replica, "init"):
                raise ValueError(f"replicas.inits is for methods with an init, which {type(method).__name__} has not")
            replica.init = init  # type: ignore[assignment]
        self.save_hyperparameters({**method.hparams, "replicas": spec.count}, logger=False)
        self.combined = {"average": average, "vote": vote}[spec.ensemble]
        several = spec.count > 1 and method.classes is not None
        self.ensembles = nn.ModuleDict({s: deepcopy(e) for s, e in method.evaluations.items()} if several else {})
        self._streams: dict[int, tuple[Tensor, Tensor | None]] = {}
        for k in range(spec.count):
            exclude_from_checkpoints(self, f"replicas.{k}.backbone")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, trust: Iterable[str] = (), **arguments: Any
    ) -> Self:
        """The prompts of a checkpoint; see `SoftPromptModule.load_from_checkpoint`."""
        arguments.pop("weights_only", None)
        location = _default_map_location if map_location is None else map_location
        method, checkpoint = load_module(SoftPromptModule, checkpoint_path, trust, arguments, map_location=location)
        module = cls(method, ReplicaSpec(max(1, len(replica_numbers(checkpoint["state_dict"])))))
        for replica in module.replicas:
            limit_build(replica, checkpoint["state_dict"], checkpoint_path)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        load_tensors(module, checkpoint["state_dict"], checkpoint_path)
        return module

    @property
    def _each(self) -> Sequence[SoftPromptModule]:
        return cast("Sequence[SoftPromptModule]", self.replicas)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self._each[0].trains

    @property
    def trained(self) -> bool:
        """Whether they come trained already."""
        return self._each[0].trained

    @property
    def loaded(self) -> Backbone:
        """The one backbone."""
        return self._each[0].loaded

    @property
    def evaluations(self) -> nn.ModuleDict:
        """Those of the first replica."""
        return self._each[0].evaluations

    def configure_model(self) -> None:
        """Loads the backbone once, then makes each prompt from its own seed."""
        if self._each[0].backbone is not None:
            return
        backbone = load_backbone(spec_for_sharding(self, self._each[0].spec))
        for replica, seed in zip(self._each, self.seeds, strict=True):
            replica.attach(backbone, seed)
        prepare_for_distributed(self, backbone)

    @contextmanager
    def _stream(self, k: int) -> Iterator[None]:
        """Within it, random numbers are those that replica k would draw alone."""
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):
            if k not in self._streams:
                torch.manual_seed(self.seeds[k])
            else:
                cpu, gpu = self._streams[k]
                torch.set_rng_state(cpu)
                if gpu is not None:
                    torch.cuda.set_rng_state(gpu, self.device)
            yield
            self._streams[k] = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the replicas' losses, so that each has the gradient it would have alone."""
        logs, behind = [], training_progress(self.trainer) if self._each[0].penalties else 0.0
        share = global_loss_scale(self._each[0].objective.count(batch))
        for k, replica in enumerate(self._each):
            with self._stream(k):
                logs.append(replica.step(batch, behind, share))
        if is_logging_step(self.trainer, self.global_step + 1):
            losses = [{"loss": mean_over_processes(of["loss"].detach(), self.loaded)} for of in logs]
            told = [{**of, **loss} for of, loss in zip(logs, losses, strict=True)]
            values = [{f"train/{name}": float(value.detach()) for name, value in of.items()} for of in told]
            self.log_dict(self._together(values), batch_size=len(batch))
            loss = fmean(of["train/loss"] for of in values)
            self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(batch))
        return torch.stack([of["loss"] for of in logs]).sum()

    def _together(self, metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Mean, half of its interval, and each, of what all have: an answer of one word has no bigrams to be new."""
        together: dict[str, float] = {}
        for metric in (name for name in metrics[0] if all(name in of for of in metrics)):
            values = [float(of[metric]) for of in metrics]
            mean, half = student_interval(values)
            together |= {metric: mean, f"{metric}/interval": half} if len(values) > 1 else {metric: mean}
            together |= {f"{metric}/{name}": value for name, value in zip(self.names, values, strict=True)}
        return together

    def _scored(self, stage: str, batch: Batch) -> Records:
        records, lms = [], [replica.lm() for replica in self._each]
        for k, (replica, lm) in enumerate(zip(self._each, lms, strict=True)):
            with self._stream(k):
                records.append(replica.score(stage, batch, lm))
        if stage in self.ensembles:
            together = lms[0].with_readout(lambda _, rows: self.combined([lm.scores(rows) for lm in lms]))
            cast(Evaluation, self.ensembles[stage]).update(together, batch)
        return records[0]

    def _begin(self, stage: str, loader: Any) -> None:
        self._training = dict(self._streams)  # what a pass draws leaves no trace in training
        drawn = rows_of_limited_pass(loader)
        for replica in self._each:
            replica.reset_metrics(stage, self.current_epoch, drawn)
        if stage in self.ensembles:
            cast(Evaluation, self.ensembles[stage]).reset()

    def _end(self, stage: str) -> None:
        self._streams = self._training
        metrics: dict[str, Any] = self._together([replica.compute_metrics(stage) for replica in self._each])
        if stage in self.ensembles:
            of_all = cast(Evaluation, self.ensembles[stage]).compute()
            metrics |= {f"{stage}/{name}/ensemble": value for name, value in of_all.items()}
        self.log_dict(metrics, rank_zero_only=False)
        if stage == "val":
            step_plateau_schedules(self.trainer, metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch by each replica; gives the first one's records."""
        return self._scored("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Records:  # type: ignore[override]
        """Scores a batch by each replica; gives the first one's records."""
        return self._scored("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Records:
        """What the first replica says."""
        return self._each[0].predict_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Forgets the pass before."""
        self._begin("val", self.trainer.val_dataloaders)

    def on_test_epoch_start(self) -> None:
        """Forgets the pass before."""
        self._begin("test", self.trainer.test_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Logs the pass."""
        self._end("val")

    def on_test_epoch_end(self) -> None:
        """Logs the pass."""
        self._end("test")

    def configure_optimizers(self) -> Any:
        """One optimizer over the groups of all: none of those in use looks from one group at another."""
        groups = []
        for replica, rate, name in zip(self._each, self.rates, self.names, strict=True):
            for number, group in enumerate(replica.trainable_groups()):
                own = {} if rate is None else {"lr": rate}
                groups.append({**own, **group, "name": f"{name}/{group.get('name', number)}"})
        return self._each[0].build_optimizers(groups, [replica.project for replica in self._each])

    def scheduler_monitor(self) -> str | None:
        """As each replica has it."""
        return self._each[0].scheduler_monitor()

    def try_schedule(self, groups: Sequence[dict[str, Any]], steps: float | None) -> None:
        """As each replica does."""
        self._each[0].try_schedule(groups, steps)

    def check_prompt(self) -> None:
        """As each replica does."""
        self._each[0].check_prompt()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advances the schedule after a step; one that watches a metric advances at the end of a validation."""
        advance_schedule(scheduler)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips each replica by itself."""
        if not gradient_clip_val:
            return
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for replica in self._each:
            clip([p for p in replica.parameters() if p.requires_grad], gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As each replica does, and where its random numbers are."""
        self._each[0].on_save_checkpoint(checkpoint)
        if formats := formats_of(self._trainer):
            checkpoint[ROWS] = plain_formats(formats)
        checkpoint[STREAMS] = self._streams

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses prompts of another backbone; random numbers go on."""
        self._each[0].on_load_checkpoint(checkpoint)
        self._streams = {
            k: (cpu.cpu(), None if gpu is None else gpu.cpu()) for k, (cpu, gpu) in checkpoint[STREAMS].items()
        }


def average(scores: Sequence[Tensor]) -> Tensor:
    """[B, C] whose softmax is the mean of the prompts' probabilities."""
    return torch.stack([one.softmax(-1) for one in scores]).mean(0).log()


def vote(scores: Sequence[Tensor]) -> Tensor:
    """[B, C] by how many prompts a class is the likeliest; among equals, by their mean probability."""
    votes = sum(nn.functional.one_hot(one.argmax(-1), one.shape[-1]) for one in scores)
    return votes + average(scores).exp()  # type: ignore[operator]
