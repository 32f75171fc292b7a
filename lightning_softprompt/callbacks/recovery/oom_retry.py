"""Retries a training step that runs out of memory with the batch split in half."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_softprompt.backbones.microbatching import use_microbatches
from lightning_softprompt.callbacks.recovery.nan_guard import scaler_of
from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.methods.trainer_hooks import TrainerHooks

log = logging.getLogger(__name__)
Step = Callable[..., dict[str, Tensor]]
Result = TypeVar("Result")


@final
class Halving(Callback):
    """Retries a training step that ran out of memory with its batch split into twice as many parts, until it fits.

    The backbone runs the parts one after the other, and again in the backward pass. Prompt, loss and penalties cover
    the whole batch and use the same random numbers. The result equals that of the original step up to the order of
    sums, including dropout, and the global batch size does not change. Later steps and resumed runs keep the parts.

    Gradients are computed within the step, so that it can be retried.
    """

    def __init__(self) -> None:
        self.parts = 1

    def state_dict(self) -> dict[str, Any]:
        """The number of parts."""
        return {"parts": self.parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of parts."""
        self.parts = state_dict["parts"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the training step of the method, or of each replica, in a retry."""
        for method in cast(TrainerHooks, pl_module).methods:
            vars(method)["step"] = RetryingStep(self, method, scaler_of(trainer))
            vars(method)["prepare_step"] = RetryingPreparation(self, method)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the wrapper."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the wrapper."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        for method in cast(TrainerHooks, pl_module).methods:
            vars(method).pop("step", None)
            vars(method).pop("prepare_step", None)

    def halve(self, rows: int) -> None:
        """Double the number of parts.

        Args:
            rows: Number of rows of the step that ran out of memory, on this process.

        Raises:
            torch.OutOfMemoryError: If each row already runs alone.
        """
        if self.parts >= rows:
            raise torch.OutOfMemoryError(
                "a single row of the batch does not fit into the device's memory; lower data.max_tokens or "
                "model.length, set backbone.checkpointing, or use fewer bits (backbone.dtype, backbone.quantization)"
            )
        self.parts *= 2
        log.warning("Out of memory: splitting the %d rows of each step into %d parts from now on", rows, self.parts)


class Retrying:
    """Repeats a part of a training step that runs out of memory, with the same random numbers.

    Args:
        halving: The callback, which holds the number of parts.
        method: The method.
    """

    def __init__(self, halving: Halving, method: Any) -> None:
        self.halving, self.method = halving, method

    def retry(self, run: Callable[[], Result], rows: int) -> Result:
        """Run until the memory suffices.

        Args:
            run: The part of the step.
            rows: Number of its rows.
        """
        device = self.method.device
        while True:
            states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            try:
                return run()
            except torch.OutOfMemoryError:
                self.halving.halve(rows)
            self._restore_rng(*states)  # after the except block, nothing references the failed step

    def _restore_rng(self, cpu: Tensor, gpu: Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(gpu, self.method.device)


class RetryingStep(Retrying):
    """A method's `step` with retries.

    Args:
        halving: The callback, which holds the number of parts.
        method: The method.
        scaler: The gradient scaler of half precision, or None.
    """

    def __init__(self, halving: Halving, method: Any, scaler: Any = None) -> None:
        super().__init__(halving, method)
        self.scaler = scaler
        self.step: Step = method.step

    def __call__(self, batch: Batch, *rest: Any) -> dict[str, Tensor]:
        """Run the step; the gradients of its loss are computed already."""
        return self.retry(lambda: self._run(batch, *rest), len(batch))

    def _run(self, batch: Batch, *rest: Any) -> dict[str, Tensor]:
        parameters = list(trainable_parameters(self.method).values())
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        with use_microbatches(self.method.loaded, self.halving.parts):
            logs = self.step(batch, *rest)
            with torch.autocast(batch.mask.device.type, enabled=False):
                scaled = torch.autograd.grad(logs["loss"] * scale, parameters, allow_unused=True)
        gradients = [None if gradient is None else gradient / scale for gradient in scaled]
        values = {name: value.detach() for name, value in logs.items()}
        return {**values, "loss": PrecomputedGradients.apply(values["loss"], gradients, *parameters)}


@final
class RetryingPreparation(Retrying):
    """A method's `prepare_step` with retries.

    Args:
        halving: The callback, which holds the number of parts.
        method: The method.
    """

    def __init__(self, halving: Halving, method: Any) -> None:
        super().__init__(halving, method)
        self.prepare: Callable[[Batch], Batch] = method.prepare_step

    def __call__(self, batch: Batch) -> Batch:
        """Prepare the step; generation itself does not run in parts."""

        def run() -> Batch:
            with use_microbatches(self.method.loaded, self.halving.parts):
                return self.prepare(batch)

        try:
            return self.retry(run, len(batch))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                "the answers to a batch of questions do not fit into the device's memory; lower "
                "model.objective.answers, model.objective.max_new_tokens or data.batch_size"
            ) from error


class PrecomputedGradients(torch.autograd.Function):
    """A loss with gradients that are computed already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        """Return the loss."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, scaled by the incoming gradient."""
        return None, None, *(None if gradient is None else grad * gradient for gradient in ctx.gradients)
