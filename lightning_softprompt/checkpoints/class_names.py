"""What was trained for each class belongs to the classes of the run, by name and in their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Method = Mapping[str, Any]  # arguments of a method as plain values, as checkpoints and prompts hold them


def check_class_names(saved: Method, tensors: Iterable[str], here: Method, path: Path | str) -> None:
    """Refuses a readout that was trained for other classes, or for the same ones in another order.

    Readouts of label words have nothing trained, and go with any classes.

    Args:
        saved: The arguments of the method that was trained.
        tensors: Names of what was trained.
        here: The arguments of the method that takes it.
        path: The file, for messages.

    Raises:
        ValueError: Naming the classes of both, in their order.
    """
    names = list(tensors)
    if any(_is_of(name, "readout") for name in names):
        refuse_other_classes(_classes(saved.get("classes")), _classes(here.get("classes")), path)
    ours = here.get("classes_by_task") or {}
    for task, classes in (saved.get("classes_by_task") or {}).items():
        if task in ours and any(_is_of(name, f"readout.of_tasks.{task}") for name in names):
            refuse_other_classes(_classes(classes), _classes(ours[task]), path, f"--data.tasks.{task}.labels")


def refuse_other_classes(
    saved: list[str] | None, here: list[str] | None, path: Path | str, option: str = "--data.labels"
) -> None:
    """Refuses classes with other names, or in another order; None are not known and go with any.

    Raises:
        ValueError: Naming both.
    """
    if saved is not None and here is not None and saved != here:
        raise ValueError(
            f"{path} has a readout with weights for the classes {saved}, in this order, but the data has {here}; set "
            f"{option} so that it names the classes in the order of training"
        )


def class_names(saved: Method) -> list[str] | None:
    """The names of the classes that a method was trained with, in their order; None where it had none."""
    return _classes(saved.get("classes"))


def _classes(plain: Any) -> list[str] | None:
    arguments = plain.get("init_args") if isinstance(plain, Mapping) else None
    words = arguments.get("words") if isinstance(arguments, Mapping) else None
    return [str(name) for name in words] if isinstance(words, Mapping) else None


def _is_of(name: str, part: str) -> bool:
    """Whether a tensor belongs to a part of a method, or of one of several replicas."""
    return f".{name}".find(f".{part}.") >= 0
