"""Memory, open files and processes of a run over many tiny steps.

python benchmarks/endurance.py --steps 10000
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tiny backbones

from scenarios import BATCHES, CLASSIFICATION, START, Scenario, write_data

from lightning_softprompt.cli.app import main

COLUMNS = ("step", "memory (MB)", "open files", "child processes", "Python objects")
STATUS = Path("/proc/self/status")


class Counts(Callback):
    """Prints a row of a table at some steps.

    Args:
        every: Number of steps from row to row.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Prints the header."""
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prints the row."""
        if trainer.global_step % self.every == 0:
            gc.collect()
            memory = f"{read_resident_memory():.1f}"
            counts = (count_open_files(), len(list_children()), len(gc.get_objects()))
            cells = (trainer.global_step, memory, *counts)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def read_resident_memory() -> float:
    """Returns the memory of this process in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def count_open_files() -> int:
    """Counts the file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def list_children() -> list[str]:
    """Returns the child processes of this process, including zombies."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def run() -> int:
    """Trains, and prints the open files and child processes that remain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--wandb", default="disabled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        counts = {"class_path": "endurance.Counts", "init_args": {"every": args.every}}
        options = {
            **START, **CLASSIFICATION, **BATCHES, "trainer.max_steps": args.steps, "run.wandb": args.wandb,
            "trainer.val_check_interval": args.every, "trainer.check_val_every_n_epoch": None,
            "data.num_workers": args.workers, "trainer.log_every_n_steps": 10,
        }  # fmt: skip
        code = main([*Scenario(options).argv(folder, folder, "run"), f"--trainer.callbacks={json.dumps([counts])}"])
    print(f"ended with {code}: {count_open_files()} open files, {len(list_children())} child processes")
    return code


if __name__ == "__main__":
    sys.exit(run())
