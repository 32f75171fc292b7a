"""Where memory runs out, a step is taken again with its rows in halves: the same step, in less memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_softprompt.backbones.microbatching import microbatched
from lightning_softprompt.callbacks.recovery.nan_guard import scaler_of
from lightning_softprompt.callbacks.reporting.prompt_watch import trainable
from lightning_softprompt.core.types import Batch

log = logging.getLogger(__name__)
Step = Callable[..., dict[str, Tensor]]


@final
class Halving(Callback):
    """Takes a training step that ran out of memory again, its rows in twice as many parts, until it fits.

    The backbone runs the parts one after the other, and again in the backward pass; prompt, loss and penalties are
    those of the whole batch, with the same random numbers. So the step is the same up to the order of sums, dropout
    included, and the global batch stays as it was. Later steps keep the parts; so does a run that goes on.

    To be able to try again, gradients are made within the step; without this callback nothing changes.
    """

    def __init__(self) -> None:
        self.parts = 1

    def state_dict(self) -> dict[str, Any]:
        """In how many parts rows run."""
        return {"parts": self.parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with as many."""
        self.parts = state_dict["parts"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trying around the steps of the method, or of each replica."""
        for method in getattr(pl_module, "replicas", [pl_module]):
            method.step = Halved(self, method, scaler_of(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take it away."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        for method in getattr(pl_module, "replicas", [pl_module]):
            vars(method).pop("step", None)

    def halve(self, rows: int) -> None:
        """Twice as many parts.

        Args:
            rows: Of the step that ran out of memory, on this process.

        Raises:
            torch.OutOfMemoryError: If each row runs alone already.
        """
        if self.parts >= rows:
            raise torch.OutOfMemoryError(
                "a single row of the batch does not fit into the device's memory; lower data.max_tokens or "
                "model.length, set backbone.checkpointing, or take fewer bits (backbone.dtype, backbone.quantization)"
            )
        self.parts *= 2
        log.warning("out of memory: %d rows run in %d parts from here on, in the same step", rows, self.parts)


class Halved:
    """A method's `step` that tries again.

    Args:
        halving: Knows the parts.
        method: Whose step it is.
        scaler: What scales losses in half precision, or None.
    """

    def __init__(self, halving: Halving, method: Any, scaler: Any = None) -> None:
        self.halving, self.method, self.scaler = halving, method, scaler
        self.step: Step = method.step

    def __call__(self, batch: Batch, *rest: Any) -> dict[str, Tensor]:
        """What the step gives, its loss with gradients that are known already."""
        device = self.method.device
        while True:
            states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            try:
                return self._tried(batch, *rest)
            except torch.OutOfMemoryError:
                self.halving.halve(len(batch))
            self._as_before(*states)  # here nothing holds the failed step any more

    def _tried(self, batch: Batch, *rest: Any) -> dict[str, Tensor]:
        parameters = trainable(self.method)
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        with microbatched(self.method.loaded, self.halving.parts):
            logs = self.step(batch, *rest)
            with torch.autocast(batch.mask.device.type, enabled=False):
                found = torch.autograd.grad(logs["loss"] * scale, parameters, allow_unused=True)
        gradients = [None if gradient is None else gradient / scale for gradient in found]
        plain = {name: value.detach() for name, value in logs.items()}
        return {**plain, "loss": Known.apply(plain["loss"], gradients, *parameters)}

    def _as_before(self, cpu: Tensor, gpu: Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(gpu, self.method.device)


class Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        """The loss."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, as many times."""
        return None, None, *(None if gradient is None else grad * gradient for gradient in ctx.gradients)
