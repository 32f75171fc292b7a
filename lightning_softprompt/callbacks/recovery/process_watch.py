"""Several processes of one run: if one of them ends or stops, the others end too, with a message."""

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

from lightning_softprompt.callbacks.recovery.resume import gathered

LOST = 3  # exit code of a process whose companion is lost
LONGEST_TICK = 1.0  # seconds between two signs of life
LEAVING = 5.0  # seconds that the first process stays for the others' last look
WAY_OUT = "Resume the run with --ckpt_path last"


class Store(Protocol):
    """As much of `torch.distributed.Store` as is asked here."""

    def add(self, key: str, amount: int) -> int:
        """Counts."""

    def set(self, key: str, value: str) -> None:
        """Keeps a value."""

    def get(self, key: str) -> bytes:
        """Gives a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of these have a value."""


class ProcessWatch(Callback):
    """Each process gives a sign of life about every second, and looks for those of the others, in a thread of its own.

    A process that is killed, stopped (SIGSTOP) or unreachable for `patience` seconds, or that ended with an error, ends
    the others: the watching thread writes a message and leaves, since the main thread may be inside an exchange that
    never returns. Time counts only while the watching process runs itself, so that a machine may sleep.

    Args:
        patience: Seconds; 0 watches nothing.
        leave: Ends the process, given a message.
    """

    def __init__(self, patience: float, leave: Callable[[str], None] | None = None) -> None:
        self.patience = patience
        self._leave = leave or leave_at_once
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to watch."""
        if trainer.world_size > 1 and self.patience > 0 and self._watch is None:
            store = open_store(trainer.global_rank, self.patience)
            self._watch = Watch(store, trainer.global_rank, trainer.world_size, self.patience, self._leave)
            self._watch.start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report the error to the others. A run that was asked to stop has none."""
        if self._watch is not None:
            asked = isinstance(exception, SystemExit)
            self._watch.close("" if asked else f"{type(exception).__name__}: {exception}")
            self._watch = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report that this process is done."""
        if self._watch is not None:
            self._watch.close("")
            self._watch = None


def leave_at_once(message: str) -> None:
    """Ends the process with a message, whatever its main thread does."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(LOST)


def open_store(rank: int, patience: float) -> Store:
    """A store of the watch alone, which the first process hosts."""
    host, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=max(patience, LEAVING))
    make = partial(TCPStore, host, timeout=timeout, wait_for_workers=False)
    hosted = make(0, is_master=True) if rank == 0 else None
    port = gathered(None if hosted is None else hosted.port)[0]
    return cast(Store, hosted or make(port, is_master=False))


class Watch:
    """The signs of life of a run's processes.

    Args:
        store: Where they are counted.
        rank: The number of this process.
        world: How many there are.
        patience: Seconds without a sign after which a process is lost.
        leave: Ends this process, given a message.
    """

    def __init__(self, store: Store, rank: int, world: int, patience: float, leave: Callable[[str], None]) -> None:
        self.store, self.rank, self.patience, self.leave = store, rank, patience, leave
        self.tick = min(LONGEST_TICK, patience / 10)
        self.others = [other for other in range(world) if other != rank]
        self._signs = dict.fromkeys(self.others, -1)
        self._silent = dict.fromkeys(self.others, 0)  # ticks since the last sign
        self._rounds = 0  # exchanges with the store that returned
        self._closed = threading.Event()

    def start(self) -> None:
        """Watch from two threads: one exchanges signs, and the other sees whether that one gets answers."""
        for task in (self._exchange, self._check_store):
            threading.Thread(target=task, name=task.__name__, daemon=True).start()

    def close(self, error: str) -> None:
        """Stop watching, and report how this process ended; the first one stays until the others have read that."""
        self._closed.set()
        try:
            self.store.set(f"left/{self.rank}", error)
            deadline = monotonic() + LEAVING
            while self.rank == 0 and monotonic() < deadline and not all(map(self._has_left, self.others)):
                sleep(self.tick / 10)
        except RuntimeError:  # the store is gone with the process that hosts it
            pass

    def _exchange(self) -> None:
        while not self._closed.is_set():
            try:
                self.store.add(f"sign/{self.rank}", 1)
                lost = self._lost()
            except RuntimeError:
                lost = "the connection to process 0 of this run broke off: it was killed, or its machine is gone"
            if self._closed.is_set():
                return
            if lost is not None:
                self._end(lost)
                return
            self._rounds += 1
            sleep(self.tick)

    def _lost(self) -> str | None:
        """What happened to a process that is lost; None while there is none."""
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
            f"gave no sign of life for {self.patience:g} seconds (--run.process_timeout): it was stopped or killed, or "
            f"its machine is gone"
        )

    def _check_store(self) -> None:
        """A first process that is stopped answers nothing, and an exchange with it does not return."""
        silent, before = 0, -1
        while not self._closed.wait(self.tick):
            silent, before = (silent + 1 if before == self._rounds else 0), self._rounds
            if silent * self.tick > self.patience + self.tick:
                self._end(f"process 0 of this run {self._silence}")
                return

    def _end(self, lost: str) -> None:
        if not self._closed.is_set():
            self.leave(f"{lost}. {WAY_OUT}")


def lost_connection(error: BaseException) -> str | None:
    """What to tell a user of an exchange between processes that failed; None for other errors."""
    broken = isinstance(error, DistError) or "gloo" in str(error) or "Connection closed" in str(error)
    if not isinstance(error, RuntimeError) or not broken:
        return None
    return (
        "the connection to another process of this run broke off: it ended with an error of its own, was killed, or "
        f"its machine is gone. {WAY_OUT}"
    )
