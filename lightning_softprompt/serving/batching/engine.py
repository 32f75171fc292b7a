"""The thread that runs the backbone: it takes rows from a bounded queue and runs those that wait in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.serving.batching.jobs import Job
from lightning_softprompt.serving.batching.lanes import ClassificationLane, GenerationLane, Lane
from lightning_softprompt.serving.errors import RequestError, overloaded

log = logging.getLogger(__name__)
T = TypeVar("T")
QUIET = 10  # a batch waits for at most this number of windows while rows keep arriving


@dataclass(frozen=True)
class BatchLimits:
    """How rows become batches.

    Args:
        rows: Largest number of rows of a batch.
        queue: Largest number of waiting rows.
        window: Seconds without a new row after which a batch starts.
    """

    rows: int = 32
    queue: int = 256
    window: float = 0.005


class Engine:
    """Runs rows of requests in one thread, which alone uses the backbone.

    Args:
        backbone: The backbone.
        limits: Sizes of batches and of the queue.
        on_batch: Called with the number of rows of each batch.
    """

    def __init__(
        self, backbone: Backbone, limits: BatchLimits | None = None, on_batch: Callable[[int], None] = lambda rows: None
    ) -> None:
        self.limits = limits or BatchLimits()
        self.generation = GenerationLane(backbone, self._count_running)
        self.classification = ClassificationLane(backbone)
        self.num_running = 0
        self._on_batch = on_batch
        self._queue: deque[tuple[Lane[Any], Job]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="softprompt-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and accepts rows."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def num_waiting(self) -> int:
        """Rows in the queue."""
        return len(self._queue)

    def submit(self, lane: Lane[Any], jobs: Sequence[Job]) -> None:
        """Adds the rows of a request to the queue, all or none.

        Raises:
            RequestError: If the queue has no room, or the server stops.
        """
        with self._changed:
            if not self.is_alive:
                raise RequestError(503, "the server is stopping", "stopping", retry_after=5)
            if len(self._queue) + len(jobs) > self.limits.queue:
                raise overloaded(f"{len(self._queue)} rows wait, and the queue holds {self.limits.queue}")
            self._queue.extend((lane, job) for job in jobs)
            self._changed.notify_all()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function in the thread before the next batch, such as one that loads a prompt.

        Raises:
            RequestError: If the server stops.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():  # nobody waits any more
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if not self.is_alive:
                raise RequestError(503, "the server is stopping", "stopping", retry_after=5)
            self._calls.append(run)
            self._changed.notify_all()
        return future

    def stop(self, timeout: float = 2.0) -> None:
        """Refuses further rows, fails those that wait, and ends the thread after the current batch."""
        with self._changed:
            self._is_stopping = True
            waiting = [job for _, job in self._queue]
            self._queue.clear()
            self._changed.notify_all()
        for job in waiting:
            job.fail(RequestError(503, "the server is stopping", "stopping", retry_after=5))
        self._thread.join(timeout)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP counts them for each calling thread
        while True:
            with self._changed:
                while not (self._queue or self._calls or self._is_stopping):
                    self._changed.wait()
                calls = list(self._calls)
                self._calls.clear()
                is_stopping = self._is_stopping
            for call in calls:
                call()
            if is_stopping:
                return
            if self._queue:
                self._run_batch()

    def _run_batch(self) -> None:
        self._wait_for_more()
        lane, jobs = self._take()
        if not jobs:
            return
        self._on_batch(len(jobs))
        self.num_running = len(jobs)
        try:
            lane.run(jobs)
        except Exception:  # a row must not end the thread; the client gets no details
            log.exception("a batch of %d rows failed", len(jobs))
        finally:
            self.num_running = 0
        for job in jobs:  # no effect on rows that are finished
            job.fail(RequestError(500, "the server failed to run the row", "internal_error"))

    def _wait_for_more(self) -> None:
        """Waits until no row arrives within the window, or a batch is full."""
        end = time.monotonic() + QUIET * self.limits.window
        with self._changed:
            count = 0
            while count < len(self._queue) < self.limits.rows and time.monotonic() < end:
                count = len(self._queue)
                self._changed.wait(self.limits.window)

    def _take(self) -> tuple[Lane[Any], list[Job]]:
        """Removes the first rows of the same kind from the queue; dropped rows are left out."""
        with self._changed:
            lane = self._queue[0][0]
            chosen = [entry for entry in self._queue if entry[0] is lane][: self.limits.rows]
            for entry in chosen:
                self._queue.remove(entry)
        return lane, [job for _, job in chosen if not job.is_dropped]

    def _count_running(self, rows: int) -> None:
        self.num_running = rows
