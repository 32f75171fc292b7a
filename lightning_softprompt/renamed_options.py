"""Options with a new name: command lines and configs that use the old names keep working for one release."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lightning_softprompt.moved import REMOVED_IN
from lightning_softprompt.system.plain_yaml import load_yaml, read_yaml

log = logging.getLogger(__name__)
TASK = re.compile(r"data\.tasks\.\w+\.")  # start of an option of a task in a multi-task data module
RAG_DATA = ("RagQaDataModule", "RelevanceDataModule")
RENAMED_IN_RAG_DATA = {
    "data.passages": "data.passages.count",
    "data.passage": "data.passages.template",
    "data.mode": "data.passages.mode",
    "data.order": "data.passages.order",
    "data.gold_at": "data.passages.gold_position",
    "data.noise": "data.passages.noise",
    "data.found": "data.num_retrieved",
    "data.choices": "data.answer_form.choices",
    "data.abstain": "data.answer_form.abstain",
    "data.target": "data.answer_form.training_target",
    "data.cite": "data.answer_form.cite",
    "data.long_answers": "data.answer_form.long",
}
RENAMED = {  # old option: new option; the options of an old group move with it
    "backbone.compute": "backbone.linear_backend",
    "backbone.stands_for": "backbone.accept_prompts_of",
    "data.cut": "data.truncation_side",
    "data.retriever.way": "data.retriever.mode",
    **RENAMED_IN_RAG_DATA,
}
SCOPES = dict.fromkeys(RENAMED_IN_RAG_DATA, RAG_DATA)  # data modules in which an option has a new name; default: all
CONDITIONS: dict[str, Callable[[Any], bool]] = {  # values that an old option can have, if its name has another use
    "data.passages": lambda value: not _is_mapping(value),
    "data.target": lambda value: value in ("first", "any"),
}
CLASS_OPTIONS = {"DataModule": "data", "Retriever": "data.retriever"}  # end of a class name: the option it is used in


def rename_words(words: Sequence[str]) -> list[str]:
    """Replaces old option names in a command line, with a warning for each.

    >>> rename_words(["fit", "--backbone.compute=plain"])
    ['fit', '--backbone.linear_backend=plain']
    """
    has_scoped = any(word.startswith(tuple(f"--{option}" for option in SCOPES)) for word in words)
    data_class = _find_data_class(words) if has_scoped else None  # configs are read only if their class matters
    following = [*words[1:], ""]
    return [_rename_word(word, next_word, data_class) for word, next_word in zip(words, following, strict=True)]


def _rename_word(word: str, next_word: str, data_class: str | None) -> str:
    if not word.startswith("--"):
        return word
    option, equals, value = word.removeprefix("--").partition("=")
    option = option.replace(".init_args.", ".")
    new = _new_name(option, value if equals else next_word, data_class)
    if new is None:
        return word
    _warn(option, new)
    return f"--{new}{equals}{value}"


def _find_data_class(words: Sequence[str]) -> str | None:
    """Returns the class of the data module that a command line names, directly or in a file; None if it names none."""
    data_class = None
    for option, value in _values_by_option(words):
        if option == "data":
            data_class = _class_name(value) or data_class
        elif option == "config":
            config = _read_mapping(value)
            data_class = _class_name(config.get("data")) or data_class
    return data_class


def _values_by_option(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            pairs.append((option, value if equals else next_word))
    return pairs


def _class_name(value: Any) -> str | None:
    """Returns the class that the value of the option `data` names: a name, a mapping with a class, or a file."""
    if isinstance(value, str):
        is_class = "{" not in value and Path(value).suffix not in (".yaml", ".yml", ".json")
        value = {"class_path": value} if is_class else _read_mapping(value)
    return value.get("class_path") if isinstance(value, Mapping) else None


def _read_mapping(source: str) -> Mapping[str, Any]:
    """Reads a mapping from a file or from text; an empty one if that fails, which the parser of the command reports."""
    try:
        content = load_yaml(source) if "{" in source else read_yaml(Path(source).expanduser())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, Mapping) else {}


def rename_keys(config: Any) -> Any:
    """Replaces old option names in a parsed config, with a warning for each.

    A config may be a whole configuration, or the value of one option, such as a data module with its `init_args`.

    >>> rename_keys({"backbone": {"compute": "plain"}})
    {'backbone': {'linear_backend': 'plain'}}
    """
    if not isinstance(config, Mapping):
        return config
    renamed = dict(config)
    for old in RENAMED:
        renamed = _rename_key(renamed, old, old.split("."), None)
    return renamed


def rename_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces old option names in flat settings, such as those that checkpoints store, without a warning."""
    renamed = {}
    for name, value in settings.items():
        task = TASK.match(name)
        data_class = settings.get(f"{task[0] if task else 'data.'}class_path")
        renamed[_new_name(name, value, data_class) or name] = value
    return renamed


def _rename_key(config: Any, old: str, path: Sequence[str], data_class: str | None) -> Any:
    """Moves the value of an old option to its new place.

    Args:
        config: The mapping that holds the option.
        old: The old option.
        path: Path of the old option from this mapping; `init_args` and names of tasks are not part of it.
        data_class: Class of the data module that contains this mapping, if known.
    """
    if not isinstance(config, Mapping):
        return config
    config = dict(config)
    class_path = str(config.get("class_path", ""))
    if class_path.endswith("DataModule"):
        data_class = class_path
    path = _path_from(class_path, old, path)
    if isinstance(config.get("init_args"), Mapping):
        config["init_args"] = _rename_key(config["init_args"], old, path, data_class)
    if isinstance(config.get("tasks"), Mapping):  # the data modules of a multi-task data module
        config["tasks"] = {name: _rename_key(task, old, path, data_class) for name, task in config["tasks"].items()}
    key, *rest = path
    if key not in config:
        return config
    if rest:
        config[key] = _rename_key(config[key], old, rest, data_class)
    elif not class_path and _is_renamed(old, config[key], data_class):
        _warn(old, RENAMED[old])
        parents = old.split(".")[:-1]
        new_path = RENAMED[old].split(".")[len(parents) :]
        return _insert(config, key, new_path)
    return config


def _path_from(class_path: str, old: str, path: Sequence[str]) -> Sequence[str]:
    """Returns the path of an old option from a mapping of a class, which may be the value of an option without name."""
    if len(path) < old.count(".") + 1:
        return path  # the names of the outer mappings are known
    for end, option in CLASS_OPTIONS.items():
        if class_path.endswith(end) and old.startswith(f"{option}."):
            return old.removeprefix(f"{option}.").split(".")
    return path


def _insert(config: dict[str, Any], old: str, new: Sequence[str]) -> dict[str, Any]:
    """Moves the value of a key to a path, in the place of the key."""
    value = config[old]
    group = {} if new[0] == old else dict(config.get(new[0]) or {})
    renamed = {new[0] if key == old else key: inner for key, inner in config.items()}
    if len(new) > 1:
        renamed[new[0]] = _insert({**group, old: value}, old, new[1:])
    return renamed


def _is_mapping(value: Any) -> bool:
    """Whether a value is a mapping, or its text on a command line."""
    return isinstance(value, Mapping) or str(value).lstrip().startswith("{")


def _new_name(option: str, value: Any, data_class: str | None) -> str | None:
    """Returns the new name of an option, which may belong to a task; None if it is not renamed."""
    task = TASK.match(option)
    prefix = task[0] if task else ""
    name = "data." + option.removeprefix(prefix) if task else option
    for old, new in RENAMED.items():
        is_inside = name.startswith(f"{old}.") and not new.startswith(f"{old}.")
        if (name == old or is_inside) and _is_renamed(old, value, data_class):
            renamed = new + name.removeprefix(old)
            return prefix + renamed.removeprefix("data.") if task else renamed
    return None


def _is_renamed(old: str, value: Any, data_class: str | None) -> bool:
    """Whether an option of this name and value has a new name in a data module; all are possible if it is unknown."""
    scope = SCOPES.get(old)
    if scope and data_class and data_class.rpartition(".")[2] not in scope:
        return False
    condition = CONDITIONS.get(old)
    return condition is None or condition(value)


@cache
def _warn(old: str, new: str) -> None:
    """Logs one line for each old name."""
    log.warning("option %s is now %s; the old name stops working in version %s", old, new, REMOVED_IN)
