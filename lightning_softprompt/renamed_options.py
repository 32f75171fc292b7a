"""Options with a new name: command lines and configs that use the old names keep working for one release."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lightning_softprompt.moved import REMOVED_IN

log = logging.getLogger(__name__)
TASK = re.compile(r"data\.tasks\.\w+\.")  # start of an option of a task in a multi-task data module
RENAMED = {  # old option: new option
    "backbone.compute": "backbone.linear_backend",
    "backbone.stands_for": "backbone.accept_prompts_of",
}


def rename_words(words: Sequence[str]) -> list[str]:
    """Replaces old option names in a command line, with a warning for each.

    >>> rename_words(["fit", "--backbone.compute=plain"])
    ['fit', '--backbone.linear_backend=plain']
    """
    return [_rename_word(word) for word in words]


def _rename_word(word: str) -> str:
    if not word.startswith("--"):
        return word
    option, equals, value = word.removeprefix("--").partition("=")
    option = option.replace(".init_args.", ".")
    new = _new_name(option)
    if new is None:
        return word
    _warn(option, new)
    return f"--{new}{equals}{value}"


def rename_keys(config: Any) -> Any:
    """Replaces old option names in a parsed config, with a warning for each.

    A config may be a whole configuration, or the value of one option, such as a data module with its `init_args`.

    >>> rename_keys({"backbone": {"compute": "plain"}})
    {'backbone': {'linear_backend': 'plain'}}
    """
    if not isinstance(config, Mapping):
        return config
    renamed = dict(config)
    for old, new in RENAMED.items():
        renamed = _rename_key(renamed, old.split("."), new.split("."))
    return renamed


def rename_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces old option names in flat settings, such as those that checkpoints store, without a warning."""
    return {_new_name(name) or name: value for name, value in settings.items()}


def _rename_key(config: Any, old: Sequence[str], new: Sequence[str]) -> Any:
    """Moves the value of an old option to its new place.

    Args:
        config: The mapping that holds the option.
        old: Path of the old option from this mapping; `init_args` and names of tasks are not part of it.
        new: Path of the new option from this mapping.
    """
    if not isinstance(config, Mapping):
        return config
    config = dict(config)
    if _is_data_module(config) and old[0] == "data":
        old, new = old[1:], new[1:]
    if isinstance(config.get("init_args"), Mapping):
        config["init_args"] = _rename_key(config["init_args"], old, new)
    if isinstance(config.get("tasks"), Mapping):  # the data modules of a multi-task data module
        config["tasks"] = {name: _rename_key(task, old, new) for name, task in config["tasks"].items()}
    if len(old) > 1 and old[0] == new[0] and old[0] in config:
        config[old[0]] = _rename_key(config[old[0]], old[1:], new[1:])
    elif len(old) == 1 and old[0] in config and not _has_class(config):
        _warn(old[0], ".".join(new))
        return _insert(config, old[0], new)
    return config


def _insert(config: dict[str, Any], old: str, new: Sequence[str]) -> dict[str, Any]:
    """Moves the value of a key to a path, in the place of the key."""
    value = config[old]
    renamed = {new[0] if key == old else key: inner for key, inner in config.items()}
    if len(new) > 1:
        group = dict(config.get(new[0]) or {})
        renamed[new[0]] = _insert({**group, old: value}, old, new[1:])
    return renamed


def _has_class(config: Mapping[str, Any]) -> bool:
    return "class_path" in config


def _is_data_module(config: Mapping[str, Any]) -> bool:
    """Whether a mapping is the value of the option `data` or of a task in it."""
    return str(config.get("class_path", "")).endswith("DataModule")


def _new_name(option: str) -> str | None:
    """Returns the new name of an option, which may belong to a task; None if it is not renamed."""
    task = TASK.match(option)
    prefix = task[0] if task else ""
    name = "data." + option.removeprefix(prefix) if task else option
    new = RENAMED.get(name)
    return new and (prefix + new.removeprefix("data.") if task else new)


@cache
def _warn(old: str, new: str) -> None:
    """Logs one line for each old name."""
    log.warning("option %s is now %s; the old name stops working in version %s", old, new, REMOVED_IN)
