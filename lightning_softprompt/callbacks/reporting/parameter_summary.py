"""One line with the number of parameters of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, final

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.methods.trainer_hooks import TrainerHooks
from lightning_softprompt.runs.loggers import rank_zero_info


@final
class ParameterSummary(Callback):
    """Logs, before the first step, the method and its numbers of trainable and frozen parameters.

    Args:
        write: Logs a line once for all processes.
    """

    def __init__(self, write: Callable[[str], None] = rank_zero_info) -> None:
        self._write = write

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        self._write(summarize_parameters(cast(TrainerHooks, pl_module)))


def summarize_parameters(module: TrainerHooks) -> str:
    """Returns the line of a method or of its replicas."""
    methods = module.methods
    name = type(methods[0]).__name__
    if len(methods) > 1:
        name = f"{len(methods)} replicas of {name}"
    trainable = sum(parameter.numel() for parameter in trainable_parameters(module).values())
    total = sum(parameter.numel() for parameter in module.parameters())
    frozen, percent = total - trainable, 100 * trainable / total
    return f"{name}: {trainable:,} trainable and {frozen:,} frozen parameters ({percent:.4g} % trainable)"
