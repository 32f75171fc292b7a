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

from lightning_softprompt.runs.run_record import last_checkpoint, note_start

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "SOFTPROMPT_RUN_FOLDER"  # how processes started by the first one learn the run's folder
PROCESS_VARIABLE = "SOFTPROMPT_RUN_PROCESS"  # the number of the process that has chosen it
KEPT: list[TextIO] = []  # the lock of this process's run, open till its next one: to close it gives the folder back
NAMED: list[str] = []  # the names that this process gave
STORES: list[object] = []  # kept open: a process that has its name may be slower than the one which gave it


@dataclass(frozen=True)
class RunSpec:
    """Where a run leaves its files: `<folder>/<experiment>/<name>/`.

    Args:
        experiment: Groups runs that belong together.
        folder: Where all runs are.
        name: Of this run; None takes the time and an id. A name that another run was trained under is refused.
            `--ckpt_path last` resumes the run of this name; without a name, the run of the experiment that was started
            or resumed last, as run.json counts it, whatever clocks and file times say; of copies of a run the one with
            the most steps.
        wandb: Weights & Biases: `auto` is online where a key is configured, else offline.
        project: Project in Weights & Biases.
        predictions: File that predict writes; `-` is standard output, None is predictions.jsonl in the run's folder.
        skip_bad_steps: How many training steps in sequence may be left out because loss or gradient is not finite; the
            next one, or with 0 the first, stops the run. Their rows are named in bad_rows.jsonl in the run's folder.
        halve_on_oom: Whether a training step that runs out of a device's memory is taken again with its rows in halves,
            and later ones so from the start. The step is the same up to the order of sums, dropout included.
        monitor: Metric of validation that says which prompt is the best, as in `macro_f1` or `val/loss`; None takes the
            one of the task.
        monitor_mode: Whether the least or the greatest value of it is the best; None knows that losses, cross entropies
            and shares of empty or repeated text are better the lower they are.
        keep_last: How many of the checkpoints to go on from are kept: last.ckpt, and as last-1.ckpt, last-2.ckpt those
            before it. The best one is kept beside them.
        accept_changes: Names of settings that may differ from those of the checkpoint that --ckpt_path resumes, such as
            `data.labels,train_rows`; a name covers all below it, as `data`. Without it a difference is an error, since
            the run would not be the one that was never stopped.
        process_timeout: Seconds after which a process of the run that gives no sign of life, since it was stopped or is
            lost, ends the others with a message; 0 lets them wait as long as PyTorch does.

    Raises:
        ValueError: If keep_last is below 1, process_timeout below 0, or a name leads out of the folder of the runs.
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
    process_timeout: float = 60.0
    monitor: str | None = None
    monitor_mode: Literal["min", "max"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", os.path.expanduser(self.folder))
        if self.predictions is not None:
            object.__setattr__(self, "predictions", os.path.expanduser(self.predictions))
        _refuse_other_places(self.experiment, self.name)
        if self.keep_last < 1:
            raise ValueError(f"run.keep_last must be at least 1, got {self.keep_last}")
        if not self.process_timeout >= 0:
            raise ValueError(f"run.process_timeout must be at least 0 seconds, got {self.process_timeout}")

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

    def name_folder(self, same: Path | None = None, training: bool = False, resumed: Path | None = None) -> Path:
        """The folder of the run, the same in all its processes; a new one unless it has a name. It is not made yet.

        Args:
            same: The folder of a run that is resumed in its own folder.
            training: Whether a run is trained there, and not only tested.
            resumed: The checkpoint that it is resumed from, if any.

        Raises:
            ValueError: If another run was trained there.
        """
        if same is not None:
            _set_folder(same.absolute())
        elif not _is_inherited():
            _set_folder((self.experiment_folder / (self.name or new_name())).absolute())
        path = last_folder()
        if training and same is None and not _get_rank():
            refuse_used(path, resumed)
        return path

    def last_checkpoint(self) -> Path | None:
        """The `last.ckpt` of the run of the experiment that was started last, or of the run with `name`."""
        return last_checkpoint(self.experiment_folder, self.name)


def _refuse_other_places(experiment: str, name: str | None) -> None:
    """Refuses names by which a run would lie elsewhere than in `<folder>/<experiment>/<name>/`.

    Raises:
        ValueError: Naming the option.
    """
    if name is not None and (name in (".", "..") or len(Path(name).parts) > 1 or Path(name).is_absolute()):
        raise ValueError(
            f"run.name is {name!r}, but it must be the name of a folder, not a path: --run.folder and --run.experiment "
            f"say where the folder is"
        )
    if Path(experiment).is_absolute() or ".." in Path(experiment).parts:
        raise ValueError(f"run.experiment is {experiment!r}, but it must lie in run.folder; --run.folder names another")


def refuse_used(folder: Path, resumed: Path | None) -> None:
    """Refuses to train in the folder of another run.

    Raises:
        ValueError: If the folder has checkpoints or prompts, and it is not their run that is resumed.
    """
    inside = resumed is not None and folder.resolve() in resumed.resolve().parents
    if not inside and any([*folder.glob("checkpoints/*.ckpt"), *folder.glob("*.safetensors")]):
        raise ValueError(
            f"a run was trained in {folder}; to resume it: --ckpt_path last --run.name {folder.name}; for a new run "
            f"give another --run.name, or remove the folder"
        )


def _set_folder(path: Path) -> None:
    os.environ[FOLDER_VARIABLE], os.environ[PROCESS_VARIABLE] = str(path), str(os.getpid())


def _is_inherited() -> bool:
    """Whether the process that started this one has chosen the folder; an earlier run of this process is another."""
    started = "LOCAL_RANK" in os.environ and FOLDER_VARIABLE in os.environ
    return started and os.environ.get(PROCESS_VARIABLE) != str(os.getpid())


def make_folder(folder: Path, training: bool = False) -> None:
    """Makes a run's folder and takes it for this process.

    Raises:
        ValueError: If another run writes there now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep(folder)
    if training and not _get_rank():
        note_start(folder)


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
    """A name for a run's folder, the same in processes that were started together, and another for each run of them."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in os.environ:
        name = f"slurm-{job}-{os.environ.get('SLURM_STEP_ID', '0')}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        earlier = NAMED.count(name)
        NAMED.append(name)
        return f"{name}-{earlier + 1}" if earlier else name
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    started_by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return _of_rank_zero(name) if started_by_torchrun and os.environ["WORLD_SIZE"] != "1" else name


def _of_rank_zero(name: str) -> str:
    """What the first process would have taken; asked over the store by which torchrun's processes find each other."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    first, hosted = os.environ["RANK"] == "0", os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*place, is_master=first and not hosted, wait_for_workers=False, multi_tenant=True)
    key = f"softprompt/folder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{len(STORES)}"
    STORES.append(store)
    if first:
        store.set(key, name)
    return str(store.get(key).decode())


def last_folder() -> Path:
    """The folder of the run that this process made last."""
    return Path(os.environ[FOLDER_VARIABLE])
