"""Checks whether the prompt is learning."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.runs.loggers import is_logging_step, validation_log_step, wandb_loggers

PATIENCE = 50  # optimizer steps after which a prompt should have moved
STILL = 1e-6  # relative; float32 resolves 6e-8
EXPLODED = 100  # times the norm of the start
ALONE = 5  # consecutive logging steps with a single expert after which a router counts as collapsed


class PromptWatch(Callback):
    """Logs norm and change of the prompt; warns once if it does not change, grows too large, or is not finite.

    It also warns if the router of a mixture sends every row to the same expert for several logging steps.

    On logging steps: `prompt/norm`; `prompt/moved`, the distance from the initial prompt, relative to its norm unless
    that is zero; `prompt/grad_norm` before clipping; and `lr`, or `lr/<group>` for an optimizer with several groups
    (LearningRateMonitor would write separate rows for it). After each validation, W&B gets a histogram of the norms of
    rows, `prompt/row_norms`. All values cover every trainable parameter.
    """

    def __init__(self) -> None:
        self._start: list[Tensor] = []
        self._start_step = 0
        self._values: dict[str, float] = {}
        self._is_checked = False
        self._warned: set[str] = set()
        self._alone = 0  # consecutive logging steps at which one expert had all rows

    def state_dict(self) -> dict[str, Any]:
        """The initial prompt and step, so that a resumed run measures from them."""
        return {"start": [tensor.cpu() for tensor in self._start], "start_step": self._start_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the initial prompt and step."""
        self._start, self._start_step = state_dict["start"], state_dict["start_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the initial prompt."""
        if self._start:
            self._start = [tensor.to(pl_module.device) for tensor in self._start]
        else:
            self._start = [parameter.detach().clone() for parameter in trainable_parameters(pl_module).values()]
            self._start_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """On logging steps, store the gradient norm before clipping and the learning rates of this step."""
        if is_logging_step(trainer, trainer.global_step + 1):
            parameters = trainable_parameters(pl_module).values()
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self._values = {"prompt/grad_norm": float(get_total_norm(gradients)), **learning_rates(optimizer)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log the values of a logging step; check once whether the prompt has changed."""
        if self._values:
            parameters = trainable_parameters(pl_module).values()
            norm = float(get_total_norm([parameter.detach() for parameter in parameters]))
            values = {**self._values, "prompt/norm": norm, "prompt/moved": self._relative_change(pl_module)}
            pl_module.log_dict(values, batch_size=len(batch))
            self._values = {}
            self._warn_if_broken(norm, trainer.global_step)
            self._warn_if_collapsed(trainer)
        if not self._is_checked and trainer.global_step - self._start_step >= PATIENCE:
            self._is_checked = True
            self._warn_if_still(self._relative_change(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the norms of the rows of each trainable parameter to W&B."""
        if trainer.sanity_checking or not (loggers := wandb_loggers(trainer)):
            return
        import wandb

        histograms: Any = {name: wandb.Histogram(norms.tolist()) for name, norms in row_norms(pl_module).items()}
        for logger in loggers:
            logger.log_metrics(histograms, step=validation_log_step(trainer))

    def _relative_change(self, pl_module: LightningModule) -> float:
        pairs = zip(trainable_parameters(pl_module).values(), self._start, strict=True)
        distance = float(get_total_norm([parameter.detach() - start for parameter, start in pairs]))
        size = float(get_total_norm(self._start))
        return distance / size if size else distance

    def _warn_if_still(self, moved: float) -> None:
        if moved < STILL:
            rank_zero_warn(
                f"The prompt has barely changed after {PATIENCE} steps (relative change {moved:.1e}): it is not "
                "learning. Increase the learning rate (soft prompts often need 0.01 to 0.3), or check prompt/grad_norm"
            )

    def _warn_if_broken(self, norm: float, step: int) -> None:
        fix = "lower the learning rate, or set trainer.gradient_clip_val"
        if not math.isfinite(norm):
            message = (
                f"Optimizer step {step}: the prompt is no longer finite; {fix}, and resume from an earlier checkpoint"
            )
            self._warn_once("broken", message)
        elif norm > EXPLODED * float(get_total_norm(self._start)) > 0:
            message = f"The prompt norm grew more than {EXPLODED}x since initialization (step {step}); {fix}"
            self._warn_once("exploded", message)

    def _warn_if_collapsed(self, trainer: Trainer) -> None:
        usage = {name: float(value) for name, value in trainer.callback_metrics.items() if "/usage/" in name}
        uses_one_expert = len(usage) > 1 and max(usage.values()) == 1
        self._alone = self._alone + 1 if uses_one_expert else 0
        if self._alone >= ALONE:
            name = max(usage, key=lambda name: usage[name]).rpartition("/")[2]
            message = f"{name} received every row for {ALONE} logging steps, so the router has collapsed; "
            fix = "increase the weight of the load-balancing loss `balance` (penalty_weights: {balance: 0.01})"
            self._warn_once("collapsed", message + fix)

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(message)


def row_norms(pl_module: LightningModule) -> dict[str, Tensor]:
    """Returns the norms over the last axis of each trainable parameter, as one vector.

    The name of a single parameter is `prompt/row_norms`; several parameters, such as keys, values and a network, have
    the names `prompt/row_norms/<parameter>`.
    """
    parameters = trainable_parameters(pl_module)
    norms = {}
    for name, parameter in parameters.items():
        key = "prompt/row_norms" if len(parameters) == 1 else f"prompt/row_norms/{name}"
        norms[key] = parameter.detach().float().norm(dim=-1).flatten()
    return norms


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Returns `lr`, or `lr/<name or number>` for each of several groups."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {"lr": float(groups[0]["lr"])}
    return {f"lr/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(groups)}
