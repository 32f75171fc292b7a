"""Sends signals to a process in the middle of a step, as a scheduler does."""

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback


class SignalAt(Callback):
    """Sends a signal to its process after a batch was fetched.

    Args:
        batch: Index of the batch in the first epoch, or in a prediction.
        name: Name of the signal, such as SIGKILL.
        rank: Rank of the process that gets the signal.
        times: How often the signal is sent.
        note: Path of a file for the ids of the child processes. If set, the signal goes to all processes of the group,
            as from a terminal.
    """

    def __init__(
        self, batch: int, name: str = "SIGTERM", rank: int = 0, times: int = 1, note: str | None = None
    ) -> None:
        self.batch, self.name, self.rank, self.times, self.note = batch, name, rank, times, note

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.current_epoch == 0 and trainer.global_rank == self.rank:
            self._send()

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            self._send()

    def _send(self):
        send = partial(os.kill, os.getpid())
        if self.note is not None:
            Path(self.note).write_text(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
            send = partial(_send_from_outside, os.getpgrp())
        for _ in range(self.times):
            send(getattr(signal, self.name))


def _send_from_outside(group: int, number: int) -> None:
    """Sends from a process outside the group, because data workers ignore a signal from their parent."""
    subprocess.run(["kill", "-s", str(int(number)), "--", f"-{group}"], check=True, start_new_session=True)
