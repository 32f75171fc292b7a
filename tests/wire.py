"""What a process sends, as its kernel counts it: no library is asked."""

import json
import sys
from pathlib import Path

from lightning.pytorch import Callback

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from scaling import count_sent_bytes


class Wire(Callback):
    """Writes what each process had sent when training began, and after each step.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.sent = Path(folder), []

    def on_train_start(self, trainer, pl_module):
        self.sent = [count_sent_bytes()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sent.append(count_sent_bytes())

    def on_train_end(self, trainer, pl_module):
        (self.folder / f"sent_{trainer.global_rank}.json").write_text(json.dumps(self.sent))
