"""Further measurements of a tested checkpoint, which blocks of `experiments.yaml` name as `measures`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan import Job

from lightning_softprompt.cli.app import main as run_command
from lightning_softprompt.runs.run_spec import last_folder

OTHER_SEED = 1000  # added to the seed of a run for a second run of the same settings


@dataclass(frozen=True)
class Run:
    """What a measurement starts from.

    Args:
        job: The job.
        arguments: The options of its commands.
        checkpoint: Its best checkpoint; None without training.
        data: Folder of all data sets.
        folder: Folder of the run.
    """

    job: Job
    arguments: Sequence[str]
    checkpoint: Path | None
    data: Path
    folder: Path


def run(arguments: Sequence[str]) -> None:
    """Runs a command.

    Raises:
        SystemExit: If it fails.
    """
    code = run_command(list(arguments))
    if code:
        sys.exit(code)


def measure_line(run_of_job: Run) -> dict[str, Any]:
    """Trains a second run with another seed, and measures the validation loss along the line between both."""
    seed = run_of_job.job.seed + OTHER_SEED
    seeds = [f"--seed_everything={seed}", f"--data.seed={seed}"]
    run(["fit", *run_of_job.arguments, *seeds, "--run.name=other", "--ckpt_path=last"])
    other = last_folder() / "checkpoints" / "best.ckpt"
    out = run_of_job.folder / "line.json"
    run(["interpolate", str(run_of_job.checkpoint), str(other), f"--out={out}", *run_of_job.arguments])
    points = json.loads(out.read_text())
    return {"line": points}


MEASURES: Mapping[str, Callable[[Run], dict[str, Any]]] = {
    "line": measure_line,
}
