"""Watches the processes of a run: if one of them ends or stops, the others end too, with a message."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from time import monotonic, sleep
from typing import Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from lightning_softprompt.distributed.collectives import gather_objects

LOST = 3  # exit code if another process is lost
MAX_TICK = 1.0  # seconds between two heartbeats
EXIT_GRACE = 5.0  # seconds that the first process waits for the others to read its last message
RESUME_HINT = "Resume the run with --ckpt_path last"


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used here."""

    def add(self, key: str, amount: int) -> int:
        """Increment a counter."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def get(self, key: str) -> bytes:
        """Get a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have a value."""


class ProcessWatch(Callback):
    """Sends a heartbeat about every second, and checks those of the other processes, in a separate thread.

    If a process is killed, stopped (SIGSTOP) or unreachable for `patience` seconds, or ends with an error, the others
    end too: the watching thread prints a message and exits, because the main thread may be inside a collective
    operation that never returns. Time counts only while the watching process itself runs, so that a machine may sleep.

    Args:
        patience: Seconds without a heartbeat; 0 disables the watch.
        leave: Ends the process, given a message.
    """

    def __init__(self, patience: float, leave: Callable[[str], None] | None = None) -> None:
        self.patience = patience
        self._leave = leave or leave_at_once
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the watch."""
        if trainer.world_size > 1 and self.patience > 0 and self._watch is None:
            store = open_store(trainer.global_rank, self.patience)
            self._watch = Watch(store, trainer.global_rank, trainer.world_size, self.patience, self._leave)
            self._watch.start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report the error to the other processes; a run that was stopped by a signal has none."""
        if self._watch is not None:
            is_stop = isinstance(exception, SystemExit)
            self._watch.close("" if is_stop else f"{type(exception).__name__}: {exception}")
            self._watch = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report that this process has finished."""
        if self._watch is not None:
            self._watch.close("")
            self._watch = None


def leave_at_once(message: str) -> None:
    """End the process with a message, regardless of its main thread."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(LOST)


def open_store(rank: int, patience: float) -> Store:
    """Open a store for the watch, hosted by the first process."""
    host, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=max(patience, EXIT_GRACE))
    make = partial(TCPStore, host, timeout=timeout, wait_for_workers=False)
    hosted = make(0, is_master=True) if rank == 0 else None
    port = gather_objects(None if hosted is None else hosted.port)[0]
    return cast(Store, hosted or make(port, is_master=False))


class Watch:
    """The heartbeats of a run's processes.

    Args:
        store: Counts the heartbeats.
        rank: The rank of this process.
        world: The number of processes.
        patience: Seconds without a heartbeat after which a process is lost.
        leave: Ends this process, given a message.
    """

    def __init__(self, store: Store, rank: int, world: int, patience: float, leave: Callable[[str], None]) -> None:
        self.store, self.rank, self.patience, self.leave = store, rank, patience, leave
        self.tick = min(MAX_TICK, patience / 10)
        self.others = [other for other in range(world) if other != rank]
        self._signs = dict.fromkeys(self.others, -1)
        self._silent = dict.fromkeys(self.others, 0)  # ticks since the last heartbeat
        self._rounds = 0  # exchanges with the store that returned
        self._closed = threading.Event()

    def start(self) -> None:
        """Start two threads: one exchanges heartbeats, the other checks that the store responds."""
        for task in (self._exchange, self._check_store):
            threading.Thread(target=task, name=task.__name__, daemon=True).start()

    def close(self, error: str) -> None:
        """Stop watching and report how this process ended; the first process waits until the others have read it."""
        self._closed.set()
        try:
            self.store.set(f"left/{self.rank}", error)
            deadline = monotonic() + EXIT_GRACE
            while self.rank == 0 and monotonic() < deadline and not all(map(self._has_left, self.others)):
                sleep(self.tick / 10)
        except RuntimeError:  # the process that hosts the store has ended
            pass

    def _exchange(self) -> None:
        while not self._closed.is_set():
            try:
                self.store.add(f"sign/{self.rank}", 1)
                lost = self._find_lost()
            except RuntimeError:
                lost = (
                    "the connection to process 0 of this run was lost: the process was killed, or its machine is down"
                )
            if self._closed.is_set():
                return
            if lost is not None:
                self._end(lost)
                return
            self._rounds += 1
            sleep(self.tick)

    def _find_lost(self) -> str | None:
        """Describe what happened to a lost process; None if there is none."""
        for other in list(self.others):
            if self._has_left(other):
                if error := self.store.get(f"left/{other}").decode(errors="replace"):
                    return f"process {other} of this run ended with an error: {' '.join(error.split())}"
                self.others.remove(other)
                continue
            sign = self.store.add(f"sign/{other}", 0)
            self._silent[other] = 0 if sign != self._signs[other] else self._silent[other] + 1
            self._signs[other] = sign
            if self._silent[other] * self.tick > self.patience:
                return f"process {other} of this run {self._silence}"
        return None

    def _has_left(self, other: int) -> bool:
        return bool(self.store.check([f"left/{other}"]))

    @property
    def _silence(self) -> str:
        return (
            f"sent no heartbeat for {self.patience:g} seconds (--run.process_timeout): it was stopped or killed, or "
            f"its machine is down"
        )

    def _check_store(self) -> None:
        """Detect that the first process is stopped: requests to its store then never return."""
        silent, before = 0, -1
        while not self._closed.wait(self.tick):
            silent, before = (silent + 1 if before == self._rounds else 0), self._rounds
            if silent * self.tick > self.patience + self.tick:
                self._end(f"process 0 of this run {self._silence}")
                return

    def _end(self, lost: str) -> None:
        if not self._closed.is_set():
            self.leave(f"{lost}. {RESUME_HINT}")


def describe_lost_connection(error: BaseException) -> str | None:
    """Describe a failed communication between processes; None for other errors."""
    broken = isinstance(error, DistError) or "gloo" in str(error) or "Connection closed" in str(error)
    if not isinstance(error, RuntimeError) or not broken:
        return None
    return (
        "the connection to another process of this run was lost: it ended with an error, was killed, or its machine "
        f"is down. {RESUME_HINT}"
    )
