"""`RunSpec`: the output folder of a run, and its options for logging, checkpoints and recovery."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TextIO

from lightning.fabric.utilities.rank_zero import _get_rank

from lightning_softprompt.runs.run_record import last_checkpoint, note_evaluation, note_start
from lightning_softprompt.system.file_locks import lock_file

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "SOFTPROMPT_RUN_FOLDER"  # passes the run folder to processes started by the first one
PROCESS_VARIABLE = "SOFTPROMPT_RUN_PROCESS"  # id of the process that has chosen the folder
HELD_LOCKS: list[TextIO] = []  # lock files of this process, open until its next run
USED_NAMES: list[str] = []  # run names created by this process
OPEN_STORES: list[object] = []  # kept open for processes that read the name later


@dataclass(frozen=True)
class RunSpec:
    """Options of a run, whose files are in `<folder>/<experiment>/<name>/`.

    Args:
        experiment: Name of a group of runs.
        folder: Root folder of all runs.
        name: Name of the run (default: the time and an id). The name of another trained run is refused.
            `--ckpt_path last` resumes the run with this name; without a name, the run of the experiment that was
            started or resumed last according to run.json, regardless of file times; among copies of a run, the one
            with the most steps.
        wandb: Weights & Biases mode. `auto` is online if an API key is configured, and offline otherwise.
        project: Weights & Biases project.
        display_name: Name of the run on Weights & Biases (default: `name`). A test or validation with a display name is
            a separate run; without one, it continues the run of the training.
        group: Weights & Biases group (default: `experiment`).
        job_type: Weights & Biases job type (default: the command).
        tags: Weights & Biases tags (default: the method, the data and the backbone).
        notes: Weights & Biases notes.
        table_rows: Number of rows in the table of validation predictions on Weights & Biases, and of sampled answers.
        trial: Number of the trial of a hyperparameter search, set by `softprompt sweep`.
        predictions: Output file of predict; `-` is standard output (default: predictions.jsonl in the run folder).
        skip_bad_steps: Maximum number of consecutive training steps to skip because of a non-finite loss or gradient;
            the next one stops the run. Their rows are listed in bad_rows.jsonl in the run folder.
        halve_on_oom: On out-of-memory, retry the step with the batch split in half and keep the smaller micro-batch.
            The step equals the original one up to the order of sums, including dropout.
        monitor: Validation metric that selects the best prompt, such as `macro_f1` or `val/loss` (default: that of the
            task).
        monitor_mode: Whether the minimum or maximum of the metric is best (default: `min` for losses, cross entropies
            and the shares of empty or repeated text, else `max`).
        early_stopping: Number of validations without an improvement of `monitor` after which the training stops; 0
            disables it (default: 3 for a training without a limit of epochs, steps or time, else 0).
        train_sample: Number of training rows, the same ones each time, that are scored at each validation and logged as
            `train_sample/<metric>`; 0 for none. The difference from `val/<metric>` shows overfitting.
        watch: `tokens` logs the norm of the gradient of each soft token as `prompt/grad_norm/token_<index>`, before
            clipping, on logging steps.
        keep_last: Number of recent checkpoints to keep (last.ckpt, last-1.ckpt, ...). The best one is kept in addition.
        accept_changes: Settings that may differ from those of the checkpoint in --ckpt_path, such as
            `data.labels,train_rows`; a name covers everything below it, such as `data`. Other differences are errors,
            because the resumed run would not equal an uninterrupted one.
        process_timeout: Seconds without a heartbeat after which a process counts as lost, and the other processes of
            the run end with a message; 0 uses PyTorch's timeouts only.

    Raises:
        ValueError: If keep_last is below 1, process_timeout, early_stopping, train_sample or table_rows is negative, or
            a name leads out of the run folder.
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
    early_stopping: int | None = None
    train_sample: int = 0
    watch: Literal["tokens"] | None = None
    display_name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None
    notes: str | None = None
    table_rows: int = 16
    trial: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", os.path.expanduser(self.folder))
        if self.predictions is not None:
            object.__setattr__(self, "predictions", os.path.expanduser(self.predictions))
        _refuse_other_places(self.experiment, self.name)
        if self.keep_last < 1:
            raise ValueError(f"run.keep_last must be at least 1, got {self.keep_last}")
        if self.early_stopping is not None and self.early_stopping < 0:
            raise ValueError(f"run.early_stopping must be at least 0 validations, got {self.early_stopping}")
        for name in ("train_sample", "table_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name} must be at least 0 rows, got {getattr(self, name)}")
        if not self.process_timeout >= 0:
            raise ValueError(f"run.process_timeout must be at least 0 seconds, got {self.process_timeout}")

    @property
    def accepted_changes(self) -> list[str]:
        """The names in `accept_changes`."""
        changes = self.accept_changes or []
        names = changes.split(",") if isinstance(changes, str) else changes
        return [name.strip() for name in names]

    @property
    def experiment_folder(self) -> Path:
        """The folder of the experiment's runs."""
        return Path(self.folder, self.experiment)

    def name_folder(self, same: Path | None = None, training: bool = False, resumed: Path | None = None) -> Path:
        """Choose the folder of the run, the same in all its processes, without creating it.

        Args:
            same: The folder of the resumed run, if it continues in its own folder.
            training: Whether the run trains.
            resumed: The checkpoint that the run is resumed from, if any.

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
        """The `last.ckpt` of the latest run of the experiment, or of the run with `name`."""
        return last_checkpoint(self.experiment_folder, self.name)


def _refuse_other_places(experiment: str, name: str | None) -> None:
    """Refuse names that lead out of `<folder>/<experiment>/<name>/`.

    Raises:
        ValueError: Naming the option.
    """
    is_path = name is not None and (len(Path(name).parts) > 1 or Path(name).is_absolute())
    if is_path or name in (".", ".."):
        raise ValueError(
            f"run.name is {name!r}, but it must be the name of a folder, not a path; set its location with "
            f"--run.folder and --run.experiment"
        )
    if Path(experiment).is_absolute() or ".." in Path(experiment).parts:
        raise ValueError(
            f"run.experiment is {experiment!r}, but it must be inside run.folder; use --run.folder for another location"
        )


def refuse_used(folder: Path, resumed: Path | None) -> None:
    """Refuse to train in the folder of another run.

    Raises:
        ValueError: If the folder has checkpoints or prompts of a run other than the resumed one.
    """
    inside = resumed is not None and folder.resolve() in resumed.resolve().parents
    if not inside and any([*folder.glob("checkpoints/*.ckpt"), *folder.glob("*.safetensors")]):
        raise ValueError(
            f"{folder} already contains a trained run; to resume it: --ckpt_path last --run.name {folder.name}; for a "
            f"new run, choose another --run.name or remove the folder"
        )


def _set_folder(path: Path) -> None:
    os.environ[FOLDER_VARIABLE], os.environ[PROCESS_VARIABLE] = str(path), str(os.getpid())


def _is_inherited() -> bool:
    """Whether the process that started this one has chosen the folder, not an earlier run of this process."""
    started = "LOCAL_RANK" in os.environ and FOLDER_VARIABLE in os.environ
    return started and os.environ.get(PROCESS_VARIABLE) != str(os.getpid())


def make_folder(
    folder: Path,
    command: str,
    not_in_config: Mapping[str, str] = MappingProxyType({}),
    wandb_id: str | None = None,
    source: Path | None = None,
) -> None:
    """Create a run folder and lock it for this process. The start of a training or an evaluation is recorded there.

    Args:
        folder: The folder.
        command: `fit`, `validate`, `test` or `predict`.
        not_in_config: Options that the config of the run leaves out, each with the reason.
        wandb_id: Id of the run on W&B, if it is logged there.
        source: Checkpoint or prompt that the run starts from, if any.

    Raises:
        ValueError: If another run is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock_run_folder(folder)
    if _get_rank():
        return
    if command == "fit":
        note_start(folder, not_in_config, wandb_id, source)
    elif command in ("validate", "test"):
        note_evaluation(folder, wandb_id, source)


def lock_run_folder(folder: Path) -> None:
    """Lock a run folder until this process ends. Of several processes, only the first one locks it.

    Data workers, which outlive a killed process, do not inherit this kind of lock.

    Raises:
        ValueError: If another process is writing there.
    """
    if _get_rank():
        return
    while HELD_LOCKS:
        HELD_LOCKS.pop().close()
    HELD_LOCKS.append(file := (folder / ".lock").open("a"))
    try:
        lock_file(file, folder, inherited=False)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to {folder}; wait until it ends, or choose another --run.name"
        ) from None


def new_name() -> str:
    """Create the name of a run folder: equal in processes started together, and unique for each run."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in os.environ:
        step, restart = (os.environ.get(f"SLURM_{name}", "0") for name in ("STEP_ID", "RESTART_COUNT"))
        name = f"slurm-{job}-{step}-{restart}"
        earlier = USED_NAMES.count(name)
        USED_NAMES.append(name)
        return f"{name}-{earlier + 1}" if earlier else name
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    started_by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return _share_from_rank_zero(name) if started_by_torchrun and os.environ["WORLD_SIZE"] != "1" else name


def _share_from_rank_zero(name: str) -> str:
    """Share the name of the first process through the store of torchrun's rendezvous."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    is_first, is_hosted = os.environ["RANK"] == "0", os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=is_first and not is_hosted, wait_for_workers=False, multi_tenant=True)
    key = f"softprompt/folder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{len(OPEN_STORES)}"
    OPEN_STORES.append(store)
    if is_first:
        store.set(key, name)
    return str(store.get(key).decode())


def last_folder() -> Path:
    """The folder of the latest run of this process."""
    return Path(os.environ[FOLDER_VARIABLE])
