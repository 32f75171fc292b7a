"""Classes that a checkpoint or prompt was trained with, for commands that name none and read no training rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_softprompt.core.template import Template

Words = dict[str, list[str]]


def lacks_classes(data: Any, option_of: Callable[[str], str | None]) -> bool:
    """Whether a data module or one of its tasks would infer its classes from training rows.

    Args:
        data: Its class path and arguments, as a config has them.
        option_of: The argument of a class that names the classes, if they can be inferred.
    """
    arguments = _arguments(data)
    option = option_of(data["class_path"])
    if option is not None and arguments.get(option) is None:
        return True
    return any(lacks_classes(task, option_of) for task in (arguments.get("tasks") or {}).values())


def fill_classes(data: Any, method: Mapping[str, Any], option_of: Callable[[str], str | None]) -> None:
    """Puts the classes that a method was trained with into the arguments of a data module that names none.

    Args:
        data: Its class path and arguments, which are changed.
        method: The saved arguments of the method.
        option_of: The argument of a class that names the classes, if they can be inferred.
    """
    arguments = _arguments(data)
    _fill(data, method.get("classes"), option_of)
    by_task = method.get("classes_by_task") or {}
    for name, task in (arguments.get("tasks") or {}).items():
        _fill(task, by_task.get(name), option_of)


def _fill(data: Any, saved: Any, option_of: Callable[[str], str | None]) -> None:
    arguments = _arguments(data)
    option = option_of(data["class_path"])
    if option is None or arguments.get(option) is not None or not isinstance(saved, Mapping):
        return
    words = _words(saved.get("init_args", saved))
    if words:
        arguments[option] = words if any(words.values()) else list(words)


def _words(saved: Mapping[str, Any]) -> Words:
    """The words of each class without the spaces that the template puts before them; none for a tag."""
    glue = Template(str(saved.get("template", "{target}"))).glue
    words = saved.get("words")
    if not isinstance(words, Mapping):
        return {}
    return {str(name): [str(word).removeprefix(glue) for word in spoken] for name, spoken in words.items()}


def _arguments(data: Any) -> Any:
    return data.get("init_args") or {}
