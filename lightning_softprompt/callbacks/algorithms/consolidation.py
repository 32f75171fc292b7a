"""Learns a task without forgetting former tasks: a penalty keeps the parameters that are important to them close."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, write_prompt
from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.runs.loggers import is_logging_step
from lightning_softprompt.runs.run_spec import last_folder

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]  # by parameter
FILE = "importance.safetensors"  # in a run's folder
PARTS = ("importance", "anchor")


class Consolidation(Callback, ABC):
    """Adds weight / 2 sum_i F_i (p_i - a_i)^2 to the loss for every trainable value p_i.

    F is the importance of a parameter to the previous tasks, a the anchor, its value after them. The term's gradient is
    added before clipping; its value is logged as `train/penalty/<class>` and is not part of `train/loss`. The norm of
    its gradient relative to that of the loss is logged as `train/penalty/<class>_pull`: choose a weight for which it is
    between 0.1 and 1 late in training. When training ends, importance and anchor for all tasks so far are written to
    `importance.safetensors` in the run's folder, for the run of the next task. They belong to the best checkpoint, as
    `prompt.safetensors` does.

    Args:
        weight: Weight of the term.
        former: The `importance.safetensors` of the previous run; None for the first task.
    """

    measures_untrained: ClassVar[bool] = False  # whether importance is defined without a step of training

    def __init__(self, weight: float, former: str | None = None) -> None:
        self.weight, self.former = weight, former
        self.importance: Tensors = {}
        self.anchor: Tensors = {}
        self.result: SavedPrompt | None = None  # importance and anchor of this task and the previous ones

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Read importance and anchor of the previous tasks.

        Raises:
            ValueError: If they belong to another backbone or to other parameters, there are several replicas, or the
                training has no step and importance is measured by its steps.
        """
        if not self.measures_untrained and trainer.max_steps == 0:
            raise ValueError(
                f"{type(self).__name__} measures importance by the steps of a training, and max_steps is 0; increase "
                "it, or use EWC, which measures importance without training"
            )
        if len(pl_module.methods) > 1:
            raise ValueError(f"{type(self).__name__} is for a single prompt; set replicas to 1")
        if self.former is None:
            return
        path = Path(self.former)
        saved = read_prompt(path)
        saved.check(pl_module.loaded, path)
        expected = _shapes(trainable_parameters(pl_module))
        for part in PARTS:
            tensors = {}
            for name, tensor in saved.tensors.items():
                if name.startswith(f"{part}/"):
                    tensors[name.removeprefix(f"{part}/")] = tensor.to(pl_module.device)
            if (shapes := _shapes(tensors)) != expected:
                raise ValueError(f"{path} is of the parameters {shapes}, but the method has {expected}")
            setattr(self, part, tensors)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Add the gradient, once per step even if it accumulates several batches."""
        self.observe(pl_module)
        if not self.importance:
            return
        value, pull, of_loss = torch.zeros(3, device=pl_module.device).unbind()
        is_logged = is_logging_step(trainer, trainer.global_step + 1)
        for name, parameter in trainable_parameters(pl_module).items():
            distance = parameter.detach() - self.anchor[name]
            gradient = self.weight * self.importance[name] * distance
            if is_logged:
                pull += gradient.square().sum()
                of_loss += 0 if parameter.grad is None else parameter.grad.square().sum()
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            value += (gradient * distance).sum() / 2
        if is_logged:
            term = f"train/penalty/{type(self).__name__.lower()}"
            ratio = (pull / of_loss.clamp(min=torch.finfo(of_loss.dtype).tiny)).sqrt()
            pl_module.log_dict({term: value, f"{term}_pull": ratio})

    def observe(self, module: nn.Module) -> None:
        """Reads the gradient of the loss of each step, without the term."""

    @abstractmethod
    def measure_importance(self, trainer: Trainer, module: Any) -> Tensors:
        """Returns the importance of each number to this task, at the current parameters."""

    @abstractmethod
    def merge_anchor(self, values: Tensors, importance: Tensors) -> Tensors:
        """Returns the anchor for the next task.

        Args:
            values: The current parameters.
            importance: Their importance to this task.
        """

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the importance."""
        self._conclude(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file; if the run had no step, or a resumed one none left, measure the importance first."""
        if self.result is None:
            self._conclude(trainer, pl_module)
        if trainer.is_global_zero and self.result is not None:
            write_prompt(last_folder() / FILE, self.result)
            log.info("Saved importance and anchor of the tasks so far: %s", last_folder() / FILE)

    def _conclude(self, trainer: Trainer, module: Any) -> None:
        own_state = self.state_dict()
        last_parameters = self._load_best(trainer, module)
        values = {name: p.detach().clone() for name, p in trainable_parameters(module).items()}
        importance = self.measure_importance(trainer, module)
        anchor = self.merge_anchor(values, importance)
        tensors = {f"anchor/{name}": tensor for name, tensor in anchor.items()}
        for name, tensor in importance.items():
            total = tensor + self.importance[name].to(tensor) if self.importance else tensor
            tensors[f"importance/{name}"] = total
        self.result = SavedPrompt(tensors, backbone_identity(module.loaded), {"_class_path": type(self).__name__})
        if last_parameters is not None:
            module.load_state_dict(last_parameters)
            self.load_state_dict(own_state)

    def _load_best(self, trainer: Trainer, module: Any) -> Mapping[str, Tensor] | None:
        """Loads the best checkpoint into the module and this callback.

        Returns:
            The module's previous tensors; None if there is no best checkpoint.
        """
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not best:
            return None
        last = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        saved = load_checkpoint(Path(best))
        module.load_state_dict(saved["state_dict"])
        self.load_state_dict(saved["callbacks"].get(self.state_key, {}))
        return last


@final
class EWC(Consolidation):
    """Elastic weight consolidation: F is the diagonal of the Fisher information (Kirkpatrick et al. 2017, 1612.00796).

    It is computed at the end of training, as the mean over rows of the squared gradient of each row's loss. With
    `--trainer.max_steps 0`, it is computed without training: the importance of the initial parameters to the rows, such
    as that of a pre-trained backbone to general text. The terms of several former tasks are combined into one with the
    same gradient: F is their sum, and a the mean of their final values weighted by F.

    Differences from the paper: the gradient is that of the rows' answers, not of answers sampled from the model.

    Args:
        weight: lambda.
        former: See `Consolidation`.
        rows: Number of training rows, the first of the first epoch.
    """

    measures_untrained = True

    def __init__(self, weight: float = 1000.0, former: str | None = None, rows: int = 256) -> None:
        super().__init__(weight, former)
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.rows = rows

    def measure_importance(self, trainer: Trainer, module: Any) -> Tensors:
        """Returns the mean of squared gradients over the rows of all processes."""
        names, parameters = zip(*trainable_parameters(module).items(), strict=True)
        squares = [torch.zeros_like(p) for p in parameters]
        rows = list(self._rows(trainer))
        training = module.training
        module.eval()  # without dropout, so that the result is deterministic
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
        """Returns batches of one row, or of the rows that answer one question."""
        remaining = max(1, self.rows // trainer.world_size)
        for batch in trainer.datamodule.train_dataloader():  # type: ignore[attr-defined]  # from the first row on
            units = batch.units()
            for unit in units[:remaining]:
                yield batch.only(unit)
            remaining -= len(units)
            if remaining <= 0:
                return

    def merge_anchor(self, values: Tensors, importance: Tensors) -> Tensors:
        """Returns the mean of the final values of all tasks, weighted by importance; if all are 0, the last value."""
        if not self.importance:
            return values
        merged = {}
        for name, value in values.items():
            former_importance, former_anchor = self.importance[name].to(value), self.anchor[name].to(value)
            total = former_importance + importance[name]
            weighted = former_importance * former_anchor + importance[name] * value
            mean = weighted / total.clamp(min=torch.finfo(total.dtype).tiny)
            merged[name] = torch.where(total > 0, mean, value)
        return merged


@final
class SynapticIntelligence(Consolidation):
    """Synaptic intelligence: F is how much each number lowered the loss in training (Zenke et al. 2017, 1703.04200).

    F = 2 sum over tasks of max(0, w) / (d^2 + damping), where d is the change of a number in a task and w the sum over
    steps of minus its gradient times its step. The anchor is the value after the last task.

    Differences from the paper: a number that raised the loss of a task has no importance to it, as in the authors'
    code.

    Args:
        weight: c.
        former: See `Consolidation`.
        damping: xi, which limits the importance of numbers that did not change.
    """

    def __init__(self, weight: float = 0.1, former: str | None = None, damping: float = 0.1) -> None:
        super().__init__(weight, former)
        if damping <= 0:
            raise ValueError(f"damping must be above 0, got {damping}")
        self.damping = damping
        self.work: Tensors = {}  # w
        self.start: Tensors = {}  # initial values
        self._step: Mapping[str, tuple[Tensor, Tensor]] = {}  # gradients and values before the step

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, so that a run can be resumed."""
        return {"work": self.work, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums."""
        self.work = dict(state_dict.get("work", {}))
        self.start = dict(state_dict.get("start", {}))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Store the initial values, unless the run was resumed."""
        if not self.start:
            for name, parameter in trainable_parameters(pl_module).items():
                self.start[name] = parameter.detach().clone()
        for tensors in (self.start, self.work):
            tensors.update({name: t.to(pl_module.device) for name, t in tensors.items()})

    def observe(self, module: nn.Module) -> None:
        """Stores the gradient until the step is taken. A step with a non-finite gradient is not taken."""
        step = {}
        for name, parameter in trainable_parameters(module).items():
            if parameter.grad is not None:
                step[name] = parameter.grad.detach().clone(), parameter.detach().clone()
        is_finite = all(gradient.isfinite().all() for gradient, _ in step.values())
        self._step = step if is_finite else {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Add the work of the step; a batch that is only accumulated takes no step."""
        parameters = trainable_parameters(pl_module)
        for name, (gradient, value) in self._step.items():
            work = -gradient * (parameters[name].detach() - value)
            self.work[name] = work + self.work.get(name, torch.zeros_like(work))
        self._step = {}

    def measure_importance(self, trainer: Trainer, module: Any) -> Tensors:
        """Returns 2 max(0, w) / (d^2 + damping) by parameter."""
        importance = {}
        for name, parameter in trainable_parameters(module).items():
            value = parameter.detach()
            work = self.work.get(name, torch.zeros_like(value)).to(value.device).clamp(min=0)
            change = value - self.start.get(name, value).to(value.device)
            importance[name] = 2 * work / (change**2 + self.damping)
        return importance

    def merge_anchor(self, values: Tensors, importance: Tensors) -> Tensors:
        """Returns the current values."""
        return values


def can_measure_untrained(callback: Callback) -> bool:
    """Whether a callback measures importance in a run without a step of training."""
    return isinstance(callback, Consolidation) and callback.measures_untrained


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
