"""Which run of an experiment was started last, by a count and not by clocks."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from lightning_softprompt.checkpoints.prompt_file import load_checkpoint
from lightning_softprompt.system.atomic_files import write_file

RECORD = "run.json"
LAST = Path("checkpoints", "last.ckpt")


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` in a run's folder says; a copy of the folder says the same.

    Args:
        id: Of the run, the same in all copies.
        name: Of the folder that it was started in.
        order: Of its last start among all starts and resumptions in the experiment; 0 where an earlier version ran it.
        started: The time of that, for people.
    """

    id: str
    name: str
    order: int
    started: str


def read_record(folder: Path) -> RunRecord:
    """The record of a run; one of order 0 where there is none that can be read."""
    try:
        values = json.loads((folder / RECORD).read_bytes())
        return RunRecord(str(values["id"]), str(values["name"]), int(values["order"]), str(values["started"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):  # a record that somebody forged
        return RunRecord(f"unknown, {folder.name}", folder.name, 0, "unknown")


def note_start(folder: Path) -> None:
    """Records that the run in a folder starts or is resumed, after all others of its experiment."""
    others = [read_record(path.parent).order for path in folder.parent.glob(f"*/{RECORD}")]
    before, now = read_record(folder), f"{datetime.now():%F %T}"
    identity = before.id if before.order and before.name == folder.name else secrets.token_hex(8)
    record = RunRecord(identity, folder.name, max(others, default=0) + 1, now)
    write_file(folder / RECORD, f"{json.dumps(asdict(record), indent=2)}\n".encode())


def last_checkpoint(experiment: Path, name: str | None = None) -> Path | None:
    """The `last.ckpt` of the run that was started or resumed last; None where no run has one.

    Of copies of one run it is the one with the most steps, or that in the folder it was started in.

    Args:
        experiment: The folder of all runs.
        name: Of the only run that is looked at.

    Raises:
        ValueError: If several runs could be meant.
    """
    named = experiment.iterdir() if name is None and experiment.is_dir() else [experiment / str(name)]
    folders = sorted(folder for folder in named if (folder / LAST).is_file())
    if not folders:
        return None
    records = {folder: read_record(folder) for folder in folders}
    newest = max(record.order for record in records.values())
    chosen = [folder for folder in folders if records[folder].order == newest]
    if len(chosen) > 1 and len({records[folder].id for folder in chosen}) == 1:
        chosen = _of_copies(chosen, records[chosen[0]].name)
    if len(chosen) > 1:
        raise ValueError(
            f"--ckpt_path last: which of these runs was started last is not recorded: {_listed(chosen)}. Name one "
            f"with --run.name, or give its checkpoint as --ckpt_path"
        )
    return chosen[0] / LAST


def _of_copies(folders: Sequence[Path], name: str) -> list[Path]:
    steps = {folder: _steps(folder) for folder in folders}
    most = [folder for folder in folders if steps[folder] == max(steps.values())]
    original = [folder for folder in most if folder.name == name]
    return original or most


def _steps(folder: Path) -> int:
    return int(load_checkpoint(folder / LAST).get("global_step", 0))


def _listed(folders: Sequence[Path]) -> str:
    told = [f"{folder / LAST} (step {_steps(folder)}, started {read_record(folder).started})" for folder in folders]
    return ", ".join(told)
