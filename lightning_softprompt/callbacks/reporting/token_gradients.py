"""Logs which soft tokens are trained."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_softprompt.core.types import Batch
from lightning_softprompt.runs.loggers import is_logging_step

PARAMETER = "tokens"  # the name of the soft tokens in methods of which they are a parameter


class TokenGradients(Callback):
    """Logs the norm of the gradient of each soft token on logging steps, before clipping.

    The metrics are `prompt/grad_norm/token_0` and so on. The method must have soft tokens as a parameter. If a network
    reads them, as in P-Tuning, they are the input of the network.
    """

    def __init__(self) -> None:
        self._norms: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse methods without such a parameter.

        Raises:
            ValueError: Naming the method.
        """
        if not isinstance(getattr(pl_module, PARAMETER, None), nn.Parameter):
            raise ValueError(
                f"run.watch=tokens requires a method whose soft tokens are a parameter, such as PromptTuning, got "
                f"{type(pl_module).__name__}"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """On logging steps, store the norms."""
        gradient = getattr(pl_module, PARAMETER).grad
        if gradient is not None and is_logging_step(trainer, trainer.global_step + 1):
            self._norms = gradient.detach().flatten(0, -2).norm(dim=-1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log the norms of a logging step."""
        if self._norms is None:
            return
        norms = {f"prompt/grad_norm/token_{index}": norm for index, norm in enumerate(self._norms.tolist())}
        pl_module.log_dict(norms, batch_size=len(batch))
        self._norms = None
