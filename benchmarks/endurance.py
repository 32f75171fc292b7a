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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the tiny backbones are

from scenarios import BATCHES, CLASSIFICATION, START, Scenario, write_data

from lightning_softprompt.cli.app import main

COLUMNS = ("step", "memory (MB)", "open files", "child processes", "Python objects")
STATUS = Path("/proc/self/status")


class Counts(Callback):
    """Prints a row of a table at some steps.

    Args:
        every: How many steps lie between.
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
            cells = (trainer.global_step, f"{resident():.1f}", open_files(), len(children()), len(gc.get_objects()))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def resident() -> float:
    """Megabytes that this process holds."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def children() -> list[str]:
    """Processes that this one started and that are still there, zombies too."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def run() -> int:
    """Trains, and prints what is left when it has ended."""
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
    print(f"ended with {code}: {open_files()} open files, {len(children())} child processes")
    return code


if __name__ == "__main__":
    sys.exit(run())
