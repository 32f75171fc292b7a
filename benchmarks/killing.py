"""Processes that kill themselves at a counted call of a function, so that the same seed kills at the same point."""

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
EXIT_TIMEOUT = 30.0  # seconds until processes are killed, as torchrun does


def skip_call(call: Call, *args: Any, **kwargs: Any) -> None:
    """Kills the process before the call."""


def complete_call(call: Call, *args: Any, **kwargs: Any) -> None:
    """Kills the process after the call."""
    call(*args, **kwargs)


def write_half_of_bytes(call: Call, path: Path, content: bytes) -> None:
    """Writes the first half, for `Path.write_bytes`."""
    call(path, content[: len(content) // 2])


def write_half_of_checkpoint(call: Call, checkpoint: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    """Writes the first half, for `torch.save`."""
    buffer = io.BytesIO()
    call(checkpoint, buffer, *args, **kwargs)
    content = buffer.getvalue()
    file.write(content[: len(content) // 2])
    file.flush()


def write_half_of_tensors(call: Call, tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
    """Writes the first half, for `safetensors.torch.save_file`."""
    call(tensors, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


def write_half_of_table(call: Call, writer: Any) -> None:
    """Writes the first half of the new lines of `metrics.csv`."""
    path = Path(writer.metrics_file_path)
    size_before = path.stat().st_size if path.exists() else 0
    call(writer)
    if path.exists():
        added = path.stat().st_size - size_before
        os.truncate(path, size_before + added // 2)


def write_half_of_last_line(call: Call, record_lines: Any, lines: Any) -> None:
    """Writes lines of predictions, of the last line only the first half."""
    lines = list(lines)
    last_half = [line[: len(line) // 2] for line in lines[-1:]]
    call(record_lines, [*lines[:-1], *last_half])


def write_half_of_rows(call: Call, file: Any, rows: Any) -> None:
    """Writes synthetic rows, of the last row only the first half."""
    call(file, rows)
    size = file.tell()
    file.truncate(size - len(json.dumps(rows[-1])) // 2)


@dataclass(frozen=True)
class Place:
    """A function at whose calls a process is killed.

    Args:
        where: `module:name` of the function.
        before_kill: Executes none, a part or all of the call before the kill.
        counts: Whether a call counts, by its arguments.
    """

    where: str
    before_kill: Callable[..., None] = skip_call
    counts: Callable[..., bool] = lambda *args, **kwargs: True


def is_last_batch(callback: Any, trainer: Any, *_: Any) -> bool:
    """Returns whether a callback is called for the last batch of an epoch."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


PREEMPTION = "lightning_softprompt.callbacks.recovery.preemption:Preemption."
MODULE = "lightning_softprompt.methods.base:SoftPromptModule."
PLACES = {
    "while data is prepared": Place("lightning_softprompt.data.datamodule:SoftPromptDataModule.setup"),
    "within the cache of tokens": Place("lightning_softprompt.system.tensor_files:save_file", write_half_of_tensors),
    "before a step": Place(PREEMPTION + "on_train_batch_start"),
    "within a step": Place(MODULE + "step", complete_call),
    "between backward and optimizer": Place("lightning.pytorch:LightningModule.optimizer_step"),
    "after a step": Place(PREEMPTION + "on_train_batch_end"),
    "last batch of an epoch": Place(PREEMPTION + "on_train_batch_end", counts=is_last_batch),
    "end of an epoch": Place(PREEMPTION + "on_train_epoch_end"),
    "within a validation": Place(MODULE + "score", complete_call),
    "end of a validation": Place("lightning_softprompt.callbacks.reporting.run_files:RunFiles.on_validation_end"),
    "within a checkpoint": Place("torch:save", write_half_of_checkpoint),
    "before a checkpoint has its name": Place("os:fsync", complete_call),
    "after a checkpoint": Place(
        "lightning_softprompt.checkpoints.atomic_io:AtomicCheckpointIO.save_checkpoint", complete_call
    ),
    "within metrics.csv": Place("lightning_softprompt.runs.loggers:_AppendingWriter.save", write_half_of_table),
    "within metrics.json": Place("pathlib:Path.write_bytes", write_half_of_bytes),
    "before a file has its name": Place("os:replace"),
    "after a file has its name": Place("os:replace", complete_call),
    "within prompt.safetensors": Place("lightning_softprompt.checkpoints.prompt_file:save_file", write_half_of_tensors),
    "within written rows": Place("lightning_softprompt.synthetic.writing:_append", write_half_of_rows),
    "within the files of filtered rows": Place("lightning_softprompt.cli.commands.synthetic.filter:_to_lines"),
    "end of a test": Place("lightning_softprompt.callbacks.reporting.run_files:RunFiles.on_test_end"),
    "before rows are predicted": Place(MODULE + "predict_step"),
    "after rows are predicted": Place(MODULE + "predict_step", complete_call),
    "within a line of predictions": Place(
        "lightning_softprompt.callbacks.reporting.record_lines:RecordLines._write", write_half_of_last_line
    ),
}


@dataclass(frozen=True)
class Kill:
    """A kill of a process.

    Args:
        place: Name of the place.
        number: The call of the place at which the process is killed, counted from 1.
        rank: The process, if there are several.
    """

    place: str
    number: int
    rank: int = 0


def watch(kill: Kill | None) -> Counter[str]:
    """Counts the calls of all places in this process, and kills the process at one of them."""
    counts: Counter[str] = Counter()
    for name, place in PLACES.items():
        module, _, path = place.where.partition(":")
        owner_name, _, attribute = path.rpartition(".")
        owner = import_module(module)
        owner = getattr(owner, owner_name) if owner_name else owner
        setattr(owner, attribute, _count_calls(getattr(owner, attribute), name, place, counts, kill))
    return counts


def _count_calls(call: Call, name: str, place: Place, counts: Counter[str], kill: Kill | None) -> Call:
    process = os.getpid()

    @wraps(call)
    def counting_call(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() == process and place.counts(*args, **kwargs):
            counts[name] += 1
            if kill is not None and (kill.place, kill.number) == (name, counts[name]):
                place.before_kill(call, *args, **kwargs)
                os.kill(process, signal.SIGKILL)
        return call(*args, **kwargs)

    return counting_call


def start(
    argv: Sequence[str], log: Path, kill: Kill | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Runs a command in a fork of this process, which has imported everything.

    Args:
        argv: The arguments.
        log: File of its output. The counts of its calls are written next to it as JSON, unless it is killed.
        kill: Where it is killed.
        environment: Additional environment variables.

    Returns:
        The id of the process.
    """
    if process := os.fork():
        return process
    code = 99
    try:  # the fork must end here, whatever happens
        os.setsid()  # the session identifies its children, such as data workers
        code = _run(argv, log, kill, environment or {})
        sys.stderr.flush()
    except BaseException:  # its traceback is written to the log
        with suppress(OSError):
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _run(argv: Sequence[str], log: Path, kill: Kill | None, environment: Mapping[str, str]) -> int:
    os.environ.update(environment)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.getLogger("lightning_softprompt").addHandler(logging.StreamHandler(sys.stderr))
    randomize()
    counts = watch(kill)
    try:
        return main(list(argv))
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        with suppress(OSError):  # the disk may be full
            log.with_suffix(".json").write_text(json.dumps(counts))


def randomize() -> None:
    """Randomizes the global generators, so that results which depend on them instead of the run's seed differ."""
    random.seed(os.urandom(8))
    np.random.seed(int.from_bytes(os.urandom(4)))
    torch.seed()


def two_process_environments() -> list[dict[str, str]]:
    """Returns the environments of two connected processes, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "run"}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"} for rank in "01"]


def wait_for_exit(processes: Sequence[int]) -> list[int]:
    """Waits for the processes of a run and returns their exit codes.

    If one fails, the others are terminated, and killed after a timeout, as torchrun does.
    """
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(processes):
        for process in _without(processes, codes):
            number, status = os.waitpid(process, os.WNOHANG)
            if number:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process]:
                    deadline = min(deadline, monotonic() + EXIT_TIMEOUT)
                    _send(signal.SIGTERM, _without(processes, codes))
        if monotonic() > deadline:
            _send(signal.SIGKILL, _without(processes, codes))
        sleep(0.01)
    return [codes[process] for process in processes]


def _without(processes: Sequence[int], exited: Mapping[int, int]) -> list[int]:
    return [process for process in processes if process not in exited]


def _send(number: int, processes: Sequence[int]) -> None:
    for process in processes:
        os.kill(process, number)


def find_orphans(sessions: Sequence[int]) -> list[int]:
    """Returns processes of sessions whose leader has exited, such as data workers that do not notice it in time."""
    deadline = monotonic() + EXIT_TIMEOUT
    while True:
        processes = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        orphans = [process for process in processes if _session(process) in sessions]
        if not orphans or monotonic() > deadline:
            return orphans
        sleep(0.05)


def _session(process: int) -> int:
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return 0
