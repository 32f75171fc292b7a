"""`RunSpec`: where a run leaves its files, and what is watched."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TextIO

from lightning.fabric.utilities.rank_zero import _get_rank

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "SOFTPROMPT_RUN_FOLDER"  # how processes started by the first one learn the run's folder
KEPT: list[TextIO] = []  # the lock of this process's run, open till its next one: to close it gives the folder back
STORES: list[object] = []  # kept open: a process that has its name may be slower than the one which gave it


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
        skip_bad_steps: How many training steps in sequence may be left out because loss or gradient is not finite; the
            next one, or with 0 the first, stops the run. Their rows are named in bad_rows.jsonl in the run's folder.
        halve_on_oom: Whether a training step that runs out of a device's memory is taken again with its rows in halves,
            and later ones so from the start. The step is the same up to the order of sums, dropout included.
        keep_last: How many of the checkpoints to go on from are kept: last.ckpt, and as last-1.ckpt, last-2.ckpt those
            before it. The best one is kept beside them.
        accept_changes: Names of settings that may differ from those of the checkpoint that --ckpt_path resumes, such as
            `data.labels,train_rows`; a name covers all below it, as `data`. Without it a difference is an error, since
            the run would not be the one that was never stopped.

    Raises:
        ValueError: If keep_last is below 1.
    """

    experiment: str = "default"
    folder: str = "runs"
    name: str | None = None
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "lightning-softprompt"
    predictions: str | None = None
    skip_bad_steps: int = 0
    halve_on_oom: bool = False
    keep_last: int = 1
    accept_changes: str | list[str] | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"run.keep_last must be at least 1, got {self.keep_last}")

    @property
    def accepted_changes(self) -> list[str]:
        """The names in `accept_changes`."""
        given = self.accept_changes or []
        names = given.split(",") if isinstance(given, str) else given
        return [name.strip() for name in names]

    @property
    def experiment_folder(self) -> Path:
        """Where the runs of the experiment are."""
        return Path(self.folder, self.experiment)

    def make_folder(self, same: Path | None = None) -> Path:
        """The folder of the run, the same one in all its processes; a new one unless it has a name.

        Args:
            same: That of a run which goes on; none is made.
        """
        if same is not None:
            os.environ[FOLDER_VARIABLE] = str(same.absolute())
        elif "LOCAL_RANK" not in os.environ or FOLDER_VARIABLE not in os.environ:
            os.environ[FOLDER_VARIABLE] = str((self.experiment_folder / (self.name or new_name())).absolute())
        path = Path(os.environ[FOLDER_VARIABLE])
        path.mkdir(parents=True, exist_ok=True)
        keep(path)
        return path

    def last_checkpoint(self) -> Path | None:
        """The `last.ckpt` of the experiment that was written last."""
        found = self.experiment_folder.glob("*/checkpoints/last.ckpt")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)


def keep(folder: Path) -> None:
    """Takes a run's folder for this process, until it ends; that is for the first of several to do.

    The lock is of the kind that data workers do not inherit, who outlive a process that is killed.

    Raises:
        ValueError: If another process writes there.
    """
    if _get_rank():
        return
    while KEPT:
        KEPT.pop().close()
    KEPT.append(file := (folder / ".lock").open("a"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"another run is writing to {folder}; wait for its end, or give this one another --run.name"
            ) from None
        log.warning("%s cannot be locked here (%s): see that no other run writes to it", folder, error.strerror)


def new_name() -> str:
    """A name for a run's folder, the same in processes that were started together."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in os.environ:
        return f"slurm-{job}-{os.environ.get('SLURM_STEP_ID', '0')}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    started_by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return _of_rank_zero(name) if started_by_torchrun and os.environ["WORLD_SIZE"] != "1" else name


def _of_rank_zero(name: str) -> str:
    """What the first process would have taken; asked over the store by which torchrun's processes find each other."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    first, hosted = os.environ["RANK"] == "0", os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*place, is_master=first and not hosted, wait_for_workers=False, multi_tenant=True)
    STORES.append(store)
    key = f"softprompt/folder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if first:
        store.set(key, name)
    return str(store.get(key).decode())


def last_folder() -> Path:
    """The folder of the run that this process made last."""
    return Path(os.environ[FOLDER_VARIABLE])
