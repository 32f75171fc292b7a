"""Which metrics a validation gives, and which of them is watched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from lightning.pytorch import Callback

from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.runs.run_spec import RunSpec

Mode = Literal["min", "max"]
STAGE = "val/"
SHOWN = 12  # names that a message lists
KNOWN_PACKAGES = ("lightning.", "lightning_softprompt.")  # callbacks of others may log metrics of their own


def monitored_metric(run: RunSpec, evaluation: Evaluation) -> tuple[str, Mode]:
    """The metric that says which validation is best, and whether by its least or its greatest value."""
    own, mode = evaluation.monitor
    if run.monitor is None:
        return f"{STAGE}{own}", run.monitor_mode or mode
    name = run.monitor.removeprefix(STAGE)
    usual = mode if name == own else evaluation.mode_of(name)
    return f"{STAGE}{name}", run.monitor_mode or usual


def validation_metrics(evaluation: Evaluation, replicas: Sequence[str] = ()) -> frozenset[str] | None:
    """The full names of all metrics that a validation may give; None where the evaluation does not list its own.

    Args:
        evaluation: How answers are scored.
        replicas: The names of the prompts that are trained together, if there are several.
    """
    if evaluation.logged is None:
        return None
    names = {f"{STAGE}{name}" for name in ("loss", *evaluation.logged)}
    parts = (*replicas, "interval", "ensemble") if replicas else ()
    return frozenset(names | {f"{name}/{part}" for name in names for part in parts})


def refuse_monitor(option: str, name: str, known: Collection[str] | None) -> None:
    """Refuses a metric that a validation does not give.

    Args:
        option: What names it.
        name: The metric.
        known: What a validation gives, or None where that is not known.

    Raises:
        ValueError: With the metrics that there are.
    """
    if known is None or name in known:
        return
    close = get_close_matches(name, known, n=2)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    ordered = sorted(known, key=lambda metric: (metric.count("/"), metric))
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    raise ValueError(f"{option} is {name!r}, but validation gives {', '.join(ordered[:SHOWN])}{more}.{meant}")


def refuse_monitors(callbacks: Iterable[Callback], known: Collection[str] | None) -> None:
    """Refuses callbacks that watch a metric which a validation does not give.

    Raises:
        ValueError: Naming the callback, and the metrics that there are.
    """
    callbacks = list(callbacks)
    if any(not type(callback).__module__.startswith(KNOWN_PACKAGES) for callback in callbacks):
        return
    for callback in callbacks:
        name: Any = getattr(callback, "monitor", None)
        if isinstance(name, str) and name != "loss" and not name.startswith("train/"):
            refuse_monitor(f"the monitor of {type(callback).__name__}", name, known)


def refuse_unvalidated(callbacks: Iterable[Callback], scheduled: str | None = None) -> None:
    """Refuses callbacks and a schedule that watch a metric of validation in a run without validation.

    Args:
        callbacks: Of the run.
        scheduled: The metric that the schedule watches, if it watches one.

    Raises:
        ValueError: Naming the callback, or the schedule.
    """
    monitors = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks]
    for watcher, name in [*monitors, ("the schedule", scheduled)]:
        if isinstance(name, str) and name.startswith(STAGE):
            raise ValueError(f"{watcher} watches {name}, but --trainer.limit_val_batches 0 leaves validation out")
