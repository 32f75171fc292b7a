"""Early stopping whose patience is that of the current run."""

from __future__ import annotations

from typing import Any, Literal, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_softprompt.runs.loggers import rank_zero_info


@final
class Patience(EarlyStopping):
    """Stops a training after several validations without an improvement of the monitored metric.

    A resumed training uses its current patience, where Lightning restores the one in the checkpoint.

    Args:
        monitor: The metric.
        mode: Whether its lowest or its highest value is best.
        patience: Number of validations without improvement.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"], patience: int) -> None:
        super().__init__(monitor, mode=mode, patience=patience, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best value and the number of validations since."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report an early end."""
        if self.stopped_epoch:
            rank_zero_info(
                f"Stopped early: no improvement of {self.monitor} in {self.patience} validations (best: "
                f"{float(self.best_score):.4g})"
            )
