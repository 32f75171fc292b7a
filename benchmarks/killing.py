"""Processes that kill themselves at a counted place: nothing here waits, and the same seed kills at the same place."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import torch

from lightning_softprompt.__main__ import main

Call = Callable[..., Any]
PATIENCE = 30.0  # seconds that torchrun gives processes to end


def nothing(call: Call, *args: Any, **kwargs: Any) -> None:
    """Is killed before it is called."""


def all_of_it(call: Call, *args: Any, **kwargs: Any) -> None:
    """Is killed right after it."""
    call(*args, **kwargs)


def half_of_the_bytes(call: Call, path: Path, content: bytes) -> None:
    """Of `Path.write_bytes`."""
    call(path, content[: len(content) // 2])


def half_of_the_checkpoint(call: Call, checkpoint: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    """Of `torch.save`."""
    whole = io.BytesIO()
    call(checkpoint, whole, *args, **kwargs)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()


def half_of_the_tensors(call: Call, tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
    """Of `safetensors.torch.save_file`."""
    call(tensors, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


def half_of_the_table(call: Call, writer: Any) -> None:
    """Of what `metrics.csv` gets."""
    path = Path(writer.metrics_file_path)
    before = path.stat().st_size if path.exists() else 0
    call(writer)
    if path.exists():
        os.truncate(path, before + (path.stat().st_size - before) // 2)


def half_of_the_lines(call: Call, lines: Any, written: Any) -> None:
    """Of what a file of predictions gets, broken off in a line."""
    written = list(written)
    call(lines, [*written[:-1], *(line[: len(line) // 2] for line in written[-1:])])


@dataclass(frozen=True)
class Place:
    """Where a process is killed.

    Args:
        where: `module:name` of the function.
        does: What of the call is done before.
        when: Which calls count, by their arguments.
    """

    where: str
    does: Callable[..., None] = nothing
    when: Callable[..., bool] = lambda *args, **kwargs: True


def is_last_batch(callback: Any, trainer: Any, *_: Any) -> bool:
    """Whether a callback is told of the last batch of an epoch."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


PREEMPTION = "lightning_softprompt.callbacks.recovery.preemption:Preemption."
MODULE = "lightning_softprompt.methods.base:SoftPromptModule."
PLACES = {
    "while data is prepared": Place("lightning_softprompt.data.datamodule:SoftPromptDataModule.setup"),
    "within the cache of tokens": Place("lightning_softprompt.system.tensor_files:save_file", half_of_the_tensors),
    "before a step": Place(PREEMPTION + "on_train_batch_start"),
    "within a step": Place(MODULE + "step", all_of_it),
    "between backward and optimizer": Place("lightning.pytorch:LightningModule.optimizer_step"),
    "after a step": Place(PREEMPTION + "on_train_batch_end"),
    "last batch of an epoch": Place(PREEMPTION + "on_train_batch_end", when=is_last_batch),
    "end of an epoch": Place(PREEMPTION + "on_train_epoch_end"),
    "within a validation": Place(MODULE + "score", all_of_it),
    "end of a validation": Place("lightning_softprompt.callbacks.reporting.run_files:RunFiles.on_validation_end"),
    "within a checkpoint": Place("torch:save", half_of_the_checkpoint),
    "before a checkpoint has its name": Place("os:fsync", all_of_it),
    "after a checkpoint": Place(
        "lightning_softprompt.checkpoints.atomic_io:AtomicCheckpointIO.save_checkpoint", all_of_it
    ),
    "within metrics.csv": Place("lightning_softprompt.runs.loggers:_AppendingWriter.save", half_of_the_table),
    "within metrics.json": Place("pathlib:Path.write_bytes", half_of_the_bytes),
    "before a file has its name": Place("os:replace"),
    "after a file has its name": Place("os:replace", all_of_it),
    "within prompt.safetensors": Place("lightning_softprompt.checkpoints.prompt_file:save_file", half_of_the_tensors),
    "before rows are predicted": Place(MODULE + "predict_step"),
    "after rows are predicted": Place(MODULE + "predict_step", all_of_it),
    "within a line of predictions": Place(
        "lightning_softprompt.callbacks.reporting.record_lines:RecordLines._write", half_of_the_lines
    ),
}


@dataclass(frozen=True)
class Kill:
    """The call of a place at which a process is killed, counted from 1, and which of several processes."""

    place: str
    number: int
    rank: int = 0


def watch(kill: Kill | None) -> Counter[str]:
    """Counts the calls of all places in this process, and kills it at one of them."""
    counts: Counter[str] = Counter()
    for name, place in PLACES.items():
        module, _, path = place.where.partition(":")
        holder, _, attribute = path.rpartition(".")
        owner = import_module(module)
        owner = getattr(owner, holder) if holder else owner
        setattr(owner, attribute, _counted(getattr(owner, attribute), name, place, counts, kill))
    return counts


def _counted(call: Call, name: str, place: Place, counts: Counter[str], kill: Kill | None) -> Call:
    process = os.getpid()

    @wraps(call)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() == process and place.when(*args, **kwargs):
            counts[name] += 1
            if kill is not None and (kill.place, kill.number) == (name, counts[name]):
                place.does(call, *args, **kwargs)
                os.kill(process, signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


def start(
    argv: Sequence[str], told: Path, kill: Kill | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Runs a command in a copy of this process, which has imported everything; gives its number.

    What it says goes to a file; beside it, how often it came to each place, if it was not killed.
    """
    if process := os.fork():
        return process
    code = 99
    try:  # whatever happens, the copy ends here
        os.setsid()  # of which all its processes are, data workers too
        code = _run(argv, told, kill, environment or {})
        sys.stderr.flush()
    except BaseException:  # its traceback goes to the file
        with suppress(OSError):
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _run(argv: Sequence[str], told: Path, kill: Kill | None, environment: Mapping[str, str]) -> int:
    os.environ.update(environment)
    said = os.open(told, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.getLogger("lightning_softprompt").addHandler(logging.StreamHandler(sys.stderr))
    scatter()
    counts = watch(kill)
    try:
        return main(argv)
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        with suppress(OSError):  # where the disk is full
            told.with_suffix(".json").write_text(json.dumps(counts))


def scatter() -> None:
    """Gives a process random numbers that no other has: what does not go by the run's seed shows."""
    random.seed(os.urandom(8))
    np.random.seed(int.from_bytes(os.urandom(4)))
    torch.seed()


def together() -> list[dict[str, str]]:
    """The environments of two processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "run"}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"} for rank in "01"]


def ended(processes: Sequence[int]) -> list[int]:
    """The codes of processes that were started as one; where one dies the others are told to end, as by torchrun."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(processes):
        for process in [one for one in processes if one not in codes]:
            number, status = os.waitpid(process, os.WNOHANG)
            if number:
                codes[process] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, monotonic() + PATIENCE) if codes[process] else deadline
                _tell(signal.SIGTERM, [one for one in processes if one not in codes] if codes[process] else [])
        if monotonic() > deadline:
            _tell(signal.SIGKILL, [one for one in processes if one not in codes])
        sleep(0.01)
    return [codes[process] for process in processes]


def _tell(number: int, processes: Sequence[int]) -> None:
    for process in processes:
        os.kill(process, number)


def left_running(processes: Sequence[int]) -> list[int]:
    """What is left of processes that have ended: data workers that outlive them by more than it takes to notice."""
    deadline = monotonic() + PATIENCE
    while (left := [one for one in _all_there_are() if _session(one) in processes]) and monotonic() < deadline:
        sleep(0.05)
    return left


def _all_there_are() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _session(process: int) -> int:
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return 0
