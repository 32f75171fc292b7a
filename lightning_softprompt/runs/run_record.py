"""Records which run of an experiment was started last, with a counter instead of clocks."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from lightning_softprompt import __version__
from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.git import read_commit

RECORD = "run.json"
LAST = Path("checkpoints", "last.ckpt")
OPTIONAL = ("version", "commit", "wandb_id", "source")  # values that records of earlier versions do not have


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json` in a run folder, also in copies of the folder.

    Args:
        id: Id of the run, equal in all copies.
        name: Name of the folder that it was started in.
        order: Number of its last start among all starts in the experiment; 0 for evaluations and for runs of an
            earlier version.
        started: Time of the last start.
        not_in_config: Options of a run in Python that its config.yaml leaves out, each with the reason.
        version: Version of this package at the last start; empty for runs of an earlier version.
        commit: Git commit of the current folder at the last start; empty outside a repository.
        wandb_id: Id of the run on W&B; empty if it is not logged there.
        source: Checkpoint or prompt that the run started from, relative to its folder; empty if it started untrained.
    """

    id: str
    name: str
    order: int
    started: str
    not_in_config: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    commit: str = ""
    wandb_id: str = ""
    source: str = ""


def read_record(folder: Path) -> RunRecord:
    """Read the record of a run; without a valid one, return a record of order 0."""
    try:
        values = json.loads((folder / RECORD).read_bytes())
        identity, name, started = (str(values[key]) for key in ("id", "name", "started"))
        order = int(values["order"])
        version, commit, wandb_id, source = (str(values.get(key, "")) for key in OPTIONAL)
        record = RunRecord(identity, name, order, started)
        return replace(record, version=version, commit=commit, wandb_id=wandb_id, source=source)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):  # a forged record
        return RunRecord(f"unknown, {folder.name}", folder.name, 0, "unknown")


def note_start(
    folder: Path,
    not_in_config: Mapping[str, str] = MappingProxyType({}),
    wandb_id: str | None = None,
    source: Path | None = None,
) -> None:
    """Record that the run in a folder starts or resumes now, after all others of its experiment.

    Args:
        folder: The folder of the run.
        not_in_config: Options that config.yaml leaves out, each with the reason.
        wandb_id: Id of the run on W&B, if it is logged there.
        source: Checkpoint or prompt that the run starts or resumes from. A run that resumes from a checkpoint in its
            folder keeps its first source.
    """
    others = [read_record(path.parent).order for path in folder.parent.glob(f"*/{RECORD}")]
    before, now = read_record(folder), f"{datetime.now():%F %T}"
    identity = before.id if before.order and before.name == folder.name else secrets.token_hex(8)
    order = max(others, default=0) + 1
    resumes_itself = source is not None and folder.resolve() in source.resolve().parents
    first_source = before.source if resumes_itself else _relative(source, folder)
    record = RunRecord(identity, folder.name, order, now, dict(not_in_config), source=first_source)
    _write_record(folder, record, wandb_id)


def note_evaluation(folder: Path, wandb_id: str | None = None, source: Path | None = None) -> None:
    """Record the start of an evaluation in a folder of its own; the record of a training is not changed.

    Args:
        folder: The folder of the evaluation.
        wandb_id: Id of the run on W&B, if it is logged there.
        source: Checkpoint or prompt that is evaluated; None for an untrained method.
    """
    if not (folder / RECORD).is_file():
        now = f"{datetime.now():%F %T}"
        record = RunRecord(secrets.token_hex(8), folder.name, 0, now, source=_relative(source, folder))
        _write_record(folder, record, wandb_id)


def _relative(path: Path | None, folder: Path) -> str:
    """The path relative to a folder, so that both can be moved together; empty without a path."""
    return "" if path is None else os.path.relpath(path.resolve(), folder.resolve())


def _write_record(folder: Path, record: RunRecord, wandb_id: str | None) -> None:
    """Write a record with the version and the commit of now."""
    complete = replace(record, version=__version__, commit=read_commit() or "", wandb_id=wandb_id or "")
    values = {name: value for name, value in asdict(complete).items() if value or name == "order"}
    write_file(folder / RECORD, f"{json.dumps(values, indent=2)}\n".encode())


def last_checkpoint(experiment: Path, name: str | None = None) -> Path | None:
    """Find the `last.ckpt` of the run that was started or resumed last; None if no run has one.

    Among copies of a run, the one with the most steps is chosen, or else the original.

    Args:
        experiment: The folder of all runs.
        name: Name of the run to consider (default: all runs).

    Raises:
        ValueError: If several runs qualify.
    """
    candidates = experiment.iterdir() if name is None and experiment.is_dir() else [experiment / str(name)]
    folders = sorted(folder for folder in candidates if (folder / LAST).is_file())
    if not folders:
        return None
    records = {folder: read_record(folder) for folder in folders}
    newest = max(record.order for record in records.values())
    chosen = [folder for folder in folders if records[folder].order == newest]
    if len(chosen) > 1 and len({records[folder].id for folder in chosen}) == 1:
        chosen = _select_copies(chosen, records[chosen[0]].name)
    if len(chosen) > 1:
        raise ValueError(
            f"--ckpt_path last is ambiguous: it is not recorded which of these runs was started last: "
            f"{_format_runs(chosen)}. Choose one with --run.name, or pass its checkpoint as --ckpt_path"
        )
    return chosen[0] / LAST


def _select_copies(folders: Sequence[Path], name: str) -> list[Path]:
    steps = {folder: _steps(folder) for folder in folders}
    most = [folder for folder in folders if steps[folder] == max(steps.values())]
    original = [folder for folder in most if folder.name == name]
    return original or most


def _steps(folder: Path) -> int:
    return int(load_checkpoint(folder / LAST).get("global_step", 0))


def _format_runs(folders: Sequence[Path]) -> str:
    runs = []
    for folder in folders:
        started = read_record(folder).started
        runs.append(f"{folder / LAST} (step {_steps(folder)}, started {started})")
    return ", ".join(runs)
