"""`RunSpec`: where a run leaves its files, and what is watched."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

FOLDER_VARIABLE = "SOFTPROMPT_RUN_FOLDER"  # how processes started by the first one learn the run's folder


@dataclass(frozen=True)
class RunSpec:
    """Where a run leaves its files: `<folder>/<experiment>/<name>/`.

    Args:
        experiment: Groups runs that belong together.
        folder: Where all runs are.
        name: Of this run; None takes the time and an id. A run goes on in the folder of its name if that is there.
        wandb: Weights & Biases: `auto` is online where a key is configured, else offline.
        project: Project in Weights & Biases.
        predictions: File that predict writes; `-` is standard output, None is predictions.jsonl in the run's folder.
    """

    experiment: str = "default"
    folder: str = "runs"
    name: str | None = None
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "lightning-softprompt"
    predictions: str | None = None

    def make_folder(self) -> Path:
        """The folder of the run, the same one in all its processes; a new one unless it has a name."""
        if "LOCAL_RANK" not in os.environ or FOLDER_VARIABLE not in os.environ:
            name = self.name or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            os.environ[FOLDER_VARIABLE] = str(Path(self.folder, self.experiment, name).absolute())
        path = Path(os.environ[FOLDER_VARIABLE])
        path.mkdir(parents=True, exist_ok=True)
        return path


def last_folder() -> Path:
    """The folder of the run that this process made last."""
    return Path(os.environ[FOLDER_VARIABLE])
