"""Counts the bytes that a process sends, from the counters of the kernel."""

import json
import sys
from pathlib import Path

from lightning.pytorch import Callback

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from scaling import count_sent_bytes


class Wire(Callback):
    """Writes the bytes that each process sent before training and after each step.

    Args:
        folder: Folder of the file of each process.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.sent = Path(folder), []

    def on_train_start(self, trainer, pl_module):
        self.sent = [count_sent_bytes()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sent.append(count_sent_bytes())

    def on_train_end(self, trainer, pl_module):
        (self.folder / f"sent_{trainer.global_rank}.json").write_text(json.dumps(self.sent))
