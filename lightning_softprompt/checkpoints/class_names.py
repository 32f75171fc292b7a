"""Checks that the weights of a readout match the classes of the data, by name and order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Method = Mapping[str, Any]  # arguments of a method as plain values, as in checkpoints and prompt files


def check_class_names(saved: Method, tensor_names: Iterable[str], current: Method, path: Path | str) -> None:
    """Refuses the weights of a readout if the classes have other names or another order.

    Readouts without weights, such as label words, accept any classes.

    Args:
        saved: Arguments of the trained method.
        tensor_names: Names of the trained tensors.
        current: Arguments of the method that loads the tensors.
        path: The file, for messages.

    Raises:
        ValueError: Naming the classes of both methods in their order.
    """
    names = list(tensor_names)
    if any(_is_part_of(name, "readout") for name in names):
        refuse_other_classes(class_names(saved), class_names(current), path)
    current_by_task = current.get("classes_by_task") or {}
    saved_by_task = saved.get("classes_by_task") or {}
    for task in saved_by_task:
        has_weights = any(_is_part_of(name, f"readout.of_tasks.{task}") for name in names)
        if task in current_by_task and has_weights:
            saved_classes, classes = _names(saved_by_task[task]), _names(current_by_task[task])
            refuse_other_classes(saved_classes, classes, path, f"--data.tasks.{task}.labels")


def refuse_other_classes(
    saved: list[str] | None, current: list[str] | None, path: Path | str, option: str = "--data.labels"
) -> None:
    """Refuses classes with other names or in another order. Unknown classes (None) are accepted.

    Raises:
        ValueError: Naming both.
    """
    if saved is not None and current is not None and saved != current:
        raise ValueError(
            f"{path} has a readout with weights for the classes {saved}, in this order, but the data has {current}; "
            f"set {option} so that it names the classes in the order of training"
        )


def class_names(method: Method) -> list[str] | None:
    """Returns the names of a method's classes in their order; None if it has no classes."""
    return _names(method.get("classes"))


def _names(classes: Any) -> list[str] | None:
    arguments = classes.get("init_args") if isinstance(classes, Mapping) else None
    words = arguments.get("words") if isinstance(arguments, Mapping) else None
    return [str(name) for name in words] if isinstance(words, Mapping) else None


def _is_part_of(tensor_name: str, part: str) -> bool:
    """Returns whether a tensor belongs to a part of a method or of a replica."""
    return f".{part}." in f".{tensor_name}"
