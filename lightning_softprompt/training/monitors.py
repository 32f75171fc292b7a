"""The metrics of a validation, and the one that is monitored."""

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
KNOWN_PACKAGES = ("lightning.", "lightning_softprompt.")  # other callbacks may log further metrics


def choose_monitor(run: RunSpec, evaluation: Evaluation) -> tuple[str, Mode]:
    """Returns the metric that determines the best validation, and whether its lowest or its highest value is best."""
    default, mode = evaluation.monitor
    name = default if run.monitor is None else run.monitor.removeprefix(STAGE)
    if name != default:
        mode = evaluation.mode_of(name)
    return f"{STAGE}{name}", run.monitor_mode or mode


def validation_metrics(evaluation: Evaluation, replicas: Sequence[str] = ()) -> frozenset[str] | None:
    """Returns the full names of all metrics that a validation may compute; None if the evaluation does not list them.

    Args:
        evaluation: How answers are scored.
        replicas: Names of the replicas, if there are several.
    """
    if evaluation.logged is None:
        return None
    names = {f"{STAGE}{name}" for name in ("loss", *evaluation.logged)}
    parts = (*replicas, "interval", "ensemble") if replicas else ()
    return frozenset(names | {f"{name}/{part}" for name in names for part in parts})


def refuse_monitor(option: str, name: str, known: Collection[str] | None) -> None:
    """Refuses a metric that a validation does not compute.

    Args:
        option: The option that names the metric.
        name: The metric.
        known: The metrics of a validation; None if they are unknown.

    Raises:
        ValueError: With the metrics of a validation.
    """
    if known is None or name in known:
        return
    close = get_close_matches(name, known, n=2)
    suggestion = f" Did you mean {' or '.join(close)}?" if close else ""
    ordered = sorted(known, key=lambda metric: (metric.count("/"), metric))
    metrics = ", ".join(ordered[:SHOWN])
    if len(ordered) > SHOWN:
        metrics += f" and {len(ordered) - SHOWN} more"
    raise ValueError(f"{option} is {name!r}, but validation computes {metrics}.{suggestion}")


def refuse_monitors(callbacks: Iterable[Callback], known: Collection[str] | None) -> None:
    """Refuses callbacks that monitor a metric which a validation does not compute.

    Raises:
        ValueError: Naming the callback, and the metrics of a validation.
    """
    callbacks = list(callbacks)
    if any(not type(callback).__module__.startswith(KNOWN_PACKAGES) for callback in callbacks):
        return
    for callback in callbacks:
        name: Any = getattr(callback, "monitor", None)
        if isinstance(name, str) and name != "loss" and not name.startswith("train/"):
            refuse_monitor(f"the monitor of {type(callback).__name__}", name, known)


def refuse_unvalidated(callbacks: Iterable[Callback], scheduled: str | None = None) -> None:
    """Refuses callbacks and a schedule that monitor a metric of validation in a run without validation.

    Args:
        callbacks: The callbacks of the run.
        scheduled: The metric that the schedule monitors, if any.

    Raises:
        ValueError: Naming the callback, or the schedule.
    """
    monitors = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks]
    for source, name in [*monitors, ("the schedule", scheduled)]:
        if isinstance(name, str) and name.startswith(STAGE):
            raise ValueError(f"{source} monitors {name}, but --trainer.limit_val_batches 0 disables validation")
