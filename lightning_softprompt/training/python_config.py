"""The config of a run that was started in Python, so that commands can use its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import yaml

from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.runs.run_spec import RunSpec

LINKED = ("backbone", "classes", "classes_by_task")  # arguments of methods that the command line sets by links
SEED_VARIABLE = "PL_GLOBAL_SEED"  # set by Lightning's `seed_everything`


@dataclass
class PythonConfig:
    """The values of a run in Python that a config file can express, and the others.

    Args:
        values: Plain values in the form of a config file.
        left_out: The reason for each option that has no such form, by its name.
    """

    values: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def complete_values(self) -> dict[str, Any]:
        """The values, with an empty mapping for each part of the config that is left out."""
        return {"trainer": {}, "model": {}, "data": {}, **self.values}

    @property
    def text(self) -> str:
        """The config file; a comment lists what it leaves out."""
        comments = [f"# {name} is missing: {reason}" for name, reason in self.left_out.items()]
        lines = ["# Written by a training in Python", *comments]
        return "\n".join([*lines, yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)])


def python_config(
    model: SoftPromptModule, data: SoftPromptDataModule, run: RunSpec, trainer: Mapping[str, Any]
) -> PythonConfig:
    """Collects the values of a training in Python.

    Args:
        model: The method.
        data: The data module.
        run: The options of the run folder.
        trainer: The arguments of the Trainer.
    """
    config = PythonConfig()
    if SEED_VARIABLE in os.environ:
        config.values["seed_everything"] = int(os.environ[SEED_VARIABLE])
    config.values["trainer"] = _plain_values(trainer, "trainer", config.left_out)
    config.values["model"] = _model(model, config.left_out)
    config.values["data"] = _data(data, "data", config.left_out)
    config.values["backbone"] = asdict(model.spec)
    config.values["run"] = {**asdict(run), "name": None, "accept_changes": None}
    if data.spec != model.spec:
        config.left_out["data.backbone"] = f"it is {data.spec.name}, not the backbone of the model"
    config.values = {name: value for name, value in config.values.items() if value is not None}
    return config


def _model(model: SoftPromptModule, left_out: dict[str, str]) -> dict[str, Any] | None:
    path = str(model.hparams["_class_path"])
    if not _is_importable(path):
        left_out["model"] = f"{path} cannot be imported by other programs"
        return None
    public = {name: value for name, value in model.hparams.items() if not name.startswith("_")}
    arguments = {name: value for name, value in public.items() if name not in LINKED}
    return {"class_path": path, "init_args": _plain_values(arguments, "model", left_out)}


def _data(data: SoftPromptDataModule, place: str, left_out: dict[str, str]) -> dict[str, Any] | None:
    cls = type(data)
    path = f"{cls.__module__}.{cls.__qualname__}"
    if not _is_importable(path):
        left_out[place] = f"{path} cannot be imported by other programs"
        return None
    arguments = {name: value for name, value in data.arguments.items() if name != "backbone"}
    for name in data.sources:
        if _is_rows(arguments.get(name)):
            left_out[f"{place}.{name}"] = "its rows were passed in Python"
            del arguments[name]
    return {"class_path": path, "init_args": _plain_values(arguments, place, left_out)}


def _is_rows(source: Any) -> bool:
    """Whether a source of rows is neither a name nor a list of files."""
    if source is None or isinstance(source, str):
        return False
    return not (isinstance(source, list) and all(isinstance(file, str) for file in source))


def _plain_values(arguments: Mapping[str, Any], place: str, left_out: dict[str, str]) -> dict[str, Any]:
    """The arguments that have the form of a config file; the reason for each other one is added to `left_out`."""
    values = {}
    for name, value in arguments.items():
        option = f"{place}.{name}"
        if _has_data_modules(value):
            values[name] = {key: _data(task, f"{option}.{key}", left_out) for key, task in value.items()}
            continue
        try:
            plain = _plain_value(value)
        except ValueError:
            left_out[option] = f"an object of {_type_name(value)} was passed in Python"
            continue
        unknown = next((path for path in _class_paths(plain) if not _is_importable(path)), None)
        if unknown is None:
            values[name] = plain
        else:
            left_out[option] = f"{unknown} cannot be imported by other programs"
    return values


def _has_data_modules(value: Any) -> bool:
    """Whether a value is the mapping of tasks of a multi-task data module."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(task, SoftPromptDataModule) for task in value.values())


def _plain_value(value: Any) -> Any:
    """A value in the form of a config file.

    A group of options, such as `Decoding`, has no subclasses, so a config has its options without its class.

    Raises:
        ValueError: If it has no such form.
    """
    if is_dataclass(value) and not isinstance(value, type) and type(value).__bases__ == (object,):
        return {option.name: _plain_value(getattr(value, option.name)) for option in fields(value)}
    return to_plain(value)


def _type_name(value: Any) -> str:
    """The type of a value, or the types in a list."""
    values = value if isinstance(value, list | tuple) else [value]
    return " and ".join(dict.fromkeys(type(one).__name__ for one in values))


def _class_paths(value: Any) -> Iterator[str]:
    """The import paths of the classes that a plain value names."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield str(value["class_path"])
        for inner in value.values():
            yield from _class_paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _class_paths(inner)


def _is_importable(path: str) -> bool:
    """Whether other programs can import a class: it is neither of the running script nor inside a function."""
    return not path.startswith("__main__.") and "<locals>" not in path
