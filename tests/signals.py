"""Sends a process signals in the middle of a step, as a scheduler would."""

import os
import signal

from lightning.pytorch import Callback


class SignalAt(Callback):
    """Signals itself once a batch was fetched.

    Args:
        batch: Which batch of the first epoch.
        name: Of the signal.
        rank: Which process gets it.
        times: How often.
    """

    def __init__(self, batch: int, name: str = "SIGTERM", rank: int = 0, times: int = 1) -> None:
        self.batch, self.name, self.rank, self.times = batch, name, rank, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.current_epoch == 0 and trainer.global_rank == self.rank:
            for _ in range(self.times):
                os.kill(os.getpid(), getattr(signal, self.name))
