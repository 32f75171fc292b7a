"""Learning a task without forgetting those before it: parameters that matter to them are held where they left them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_softprompt.checkpoints.prompt_file import (
    SavedPrompt,
    backbone_identity,
    load_checkpoint,
    read_prompt,
    write_prompt,
)
from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.runs.loggers import is_logging_step
from lightning_softprompt.runs.run_spec import last_folder

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]  # by parameter
FILE = "importance.safetensors"  # in a run's folder
PARTS = ("importance", "anchor")


class Consolidation(Callback, ABC):
    """Adds weight / 2 sum_i F_i (p_i - a_i)^2 to the loss of every trainable number p_i.

    F is how much a number matters to former tasks, a where they left it. The term's gradient is added before clipping;
    its value is logged as `train/penalty/<class>`, and is not part of `train/loss`. When training ends, what this task
    and those before it come to is left as `importance.safetensors` in the run's folder, for the run of the next; it is
    that of the best checkpoint, from which `prompt.safetensors` is, too.

    Args:
        weight: Of the term.
        former: The `importance.safetensors` of the run before; None where there is none.
    """

    def __init__(self, weight: float, former: str | None = None) -> None:
        self.weight, self.former = weight, former
        self.importance: Tensors = {}
        self.anchor: Tensors = {}
        self.left: SavedPrompt | None = None  # what this run and those before it come to

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Reads what former tasks left.

        Raises:
            ValueError: If it is of another backbone, or of other parameters.
        """
        if len(pl_module.methods) > 1:
            raise ValueError(f"{type(self).__name__} is for a single prompt; set replicas to 1")
        if self.former is None:
            return
        saved, path = read_prompt(Path(self.former)), Path(self.former)
        saved.check(pl_module.loaded, path)
        here = {name: list(p.shape) for name, p in trainable_parameters(pl_module).items()}
        for part in PARTS:
            found = {name.removeprefix(f"{part}/"): t for name, t in saved.tensors.items() if name.startswith(part)}
            if (there := {name: list(t.shape) for name, t in found.items()}) != here:
                raise ValueError(f"{path} is of the parameters {there}, but the method has {here}")
            setattr(self, part, {name: t.to(pl_module.device) for name, t in found.items()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Adds the gradient, once a step however many batches it has."""
        self.observe(pl_module)
        if not self.importance:
            return
        value = torch.zeros((), device=pl_module.device)
        for name, parameter in trainable_parameters(pl_module).items():
            apart = parameter.detach() - self.anchor[name]
            pull = self.weight * self.importance[name] * apart
            parameter.grad = pull if parameter.grad is None else parameter.grad + pull
            value += (pull * apart).sum() / 2
        if is_logging_step(trainer, trainer.global_step + 1):
            pl_module.log(f"train/penalty/{type(self).__name__.lower()}", value)

    def observe(self, module: nn.Module) -> None:
        """Is shown each step's gradient of the loss alone."""

    @abstractmethod
    def measured(self, trainer: Trainer, module: Any) -> Tensors:
        """How much each number matters to this task, as the module is now."""

    @abstractmethod
    def merged_anchor(self, now: Tensors, measured: Tensors) -> Tensors:
        """Where numbers are held by the next task, from where they are now."""

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measures."""
        self._conclude(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leaves the file; measures, where a run goes on that had nothing left but this."""
        if self.left is None:
            self._conclude(trainer, pl_module)
        if trainer.is_global_zero and self.left is not None:
            write_prompt(last_folder() / FILE, self.left)
            log.info("what matters to the tasks so far: %s", last_folder() / FILE)

    def _conclude(self, trainer: Trainer, module: Any) -> None:
        observed, last = self.state_dict(), self._to_best(trainer, module)
        now = {name: p.detach().clone() for name, p in trainable_parameters(module).items()}
        measured = self.measured(trainer, module)
        anchor = self.merged_anchor(now, measured)
        total = {name: t + self.importance[name].to(t) if self.importance else t for name, t in measured.items()}
        tensors = {f"importance/{name}": t for name, t in total.items()}
        tensors |= {f"anchor/{name}": t for name, t in anchor.items()}
        self.left = SavedPrompt(tensors, backbone_identity(module.loaded), {"_class_path": type(self).__name__})
        module.load_state_dict(last)
        self.load_state_dict(observed)

    def _to_best(self, trainer: Trainer, module: Any) -> Mapping[str, Tensor]:
        """Brings the module, and what was observed, to the best checkpoint; gives the parameters that it had."""
        last = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if best:
            saved = load_checkpoint(Path(best))
            module.load_state_dict(saved["state_dict"])
            self.load_state_dict(saved["callbacks"].get(self.state_key, {}))
        return last


@final
class EWC(Consolidation):
    """Elastic weight consolidation: F is the diagonal of the Fisher information (Kirkpatrick et al. 2017, 1612.00796).

    It is taken at the end of training, as the mean over rows of the squared gradient of each row's loss. Terms of
    several former tasks are kept as one: F is their sum, and a the mean of where they ended, weighed by F, which has
    the same gradient.

    Differences from the paper: rows count with their own answers, not with answers drawn from the model.

    Args:
        weight: lambda.
        former: As of `Consolidation`.
        rows: How many training rows are measured, the first of the first epoch.
    """

    def __init__(self, weight: float = 1000.0, former: str | None = None, rows: int = 256) -> None:
        super().__init__(weight, former)
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.rows = rows

    def measured(self, trainer: Trainer, module: Any) -> Tensors:
        """The mean of squared gradients, over the rows of all processes."""
        names, parameters = zip(*trainable_parameters(module).items(), strict=True)
        squares = [torch.zeros_like(p) for p in parameters]
        rows = list(self._rows(trainer))
        training = module.training
        module.eval()  # without dropout: the same, however often it is measured
        for row in rows:
            with torch.enable_grad():
                loss = module.objective(module.lm(), row.to(module.device)).loss
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for square, gradient in zip(squares, gradients, strict=True):
                square += 0 if gradient is None else gradient.float() ** 2
        module.train(training)
        means = (trainer.strategy.reduce(square / len(rows), reduce_op="mean") for square in squares)
        return dict(zip(names, means, strict=True))

    def _rows(self, trainer: Trainer) -> Iterator[Batch]:
        """Batches of one row."""
        left = max(1, self.rows // trainer.world_size)
        for batch in trainer.datamodule.train_dataloader():  # type: ignore[attr-defined]  # anew: none is passed over
            for b in range(min(left, len(batch))):
                yield batch.only([b])
            left -= len(batch)
            if left <= 0:
                return

    def merged_anchor(self, now: Tensors, measured: Tensors) -> Tensors:
        """The mean of where tasks ended; where none of them minds, where this one did."""
        if not self.importance:
            return now
        merged = {}
        for name, here in now.items():
            before, own = self.importance[name].to(here), measured[name]
            total = before + own
            mean = (before * self.anchor[name].to(here) + own * here) / total.clamp(min=torch.finfo(total.dtype).tiny)
            merged[name] = torch.where(total > 0, mean, here)
        return merged


@final
class SynapticIntelligence(Consolidation):
    """Synaptic intelligence: F by how much each number lowered the loss on its way (Zenke et al. 2017, 1703.04200).

    F = 2 sum over tasks of max(0, w) / (d^2 + damping), where d is how far a number went in a task and w the sum over
    steps of minus its gradient times its step; all numbers are held where the last task left them.

    Differences from the paper: a number that raised the loss in a task does not matter to it, as in the authors' code.

    Args:
        weight: c.
        former: As of `Consolidation`.
        damping: xi, which keeps numbers that did not move from mattering without end.
    """

    def __init__(self, weight: float = 0.1, former: str | None = None, damping: float = 0.1) -> None:
        super().__init__(weight, former)
        if damping <= 0:
            raise ValueError(f"damping must be above 0, got {damping}")
        self.damping = damping
        self.work: Tensors = {}  # w so far
        self.start: Tensors = {}  # where the task began
        self._step: Mapping[str, tuple[Tensor, Tensor]] = {}  # gradients and values before the step

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, so that a run goes on."""
        return {"work": self.work, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on measuring."""
        self.work, self.start = dict(state_dict.get("work", {})), dict(state_dict.get("start", {}))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes where the task begins, unless it began before."""
        if not self.start:
            self.start = {name: p.detach().clone() for name, p in trainable_parameters(pl_module).items()}
        for tensors in (self.start, self.work):
            tensors.update({name: t.to(pl_module.device) for name, t in tensors.items()})

    def observe(self, module: nn.Module) -> None:
        """Keeps the gradient till the step is taken; one that is not finite takes none."""
        step = {}
        for name, parameter in trainable_parameters(module).items():
            if parameter.grad is not None:
                step[name] = parameter.grad.detach().clone(), parameter.detach().clone()
        is_finite = all(gradient.isfinite().all() for gradient, _ in step.values())
        self._step = step if is_finite else {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Adds what the step did; a batch that was only accumulated is no step."""
        here = trainable_parameters(pl_module)
        for name, (gradient, before) in self._step.items():
            work = -gradient * (here[name].detach() - before)
            self.work[name] = work + self.work.get(name, torch.zeros_like(work))
        self._step = {}

    def measured(self, trainer: Trainer, module: Any) -> Tensors:
        """By parameter."""
        found = {}
        for name, p in trainable_parameters(module).items():
            work = self.work.get(name, torch.zeros_like(p)).to(p.device).clamp(min=0)
            far = p.detach() - self.start.get(name, p.detach()).to(p.device)
            found[name] = 2 * work / (far**2 + self.damping)
        return found

    def merged_anchor(self, now: Tensors, measured: Tensors) -> Tensors:
        """Where they are now."""
        return now
