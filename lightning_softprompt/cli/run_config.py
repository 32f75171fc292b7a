"""The config beside a checkpoint: its plain values and registered classes are taken, and nothing else that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_softprompt.checkpoints.arguments import (
    PLAIN,
    as_config,
    check_plain,
    read_arguments,
    read_class,
    read_value,
    shorten,
)
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.retrieval.chosen import refuse_strange_names
from lightning_softprompt.retrieval.manifest import NAME as MANIFEST
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.system.plain_yaml import read_yaml
from lightning_softprompt.training.replicas import ReplicaSpec

WORD = re.compile(r"[\w:+,-]*")  # a trainer's setting by name, such as bf16-mixed; never an import path or a file
ELSEWHERE = ("default_root_dir", "model_registry")  # trainer settings that say where files go
OF_CLASSES = ("callbacks", "logger", "plugins", "profiler", "strategy", "accelerator")
COUNTS = {
    "devices": 64,
    "num_nodes": 1,
    "num_workers": 64,
    "replicas": 1000,
    "count": 1000,
}  # of processes and copies at most
PLACES = ("predictions", "name")  # run settings that belong to one command


@dataclass(frozen=True)
class RunConfig:
    """What a command takes from the config of a run.

    Args:
        path: The config.
        values: Plain values, with registered classes by their full import paths.
        left_out: Settings that are not taken, with the reason.
    """

    path: Path
    values: Mapping[str, Any]
    left_out: Mapping[str, str]

    @property
    def text(self) -> str:
        """The values as a config that the command line takes."""
        return json.dumps(self.values)


def config_beside(checkpoint: Path) -> Path | None:
    """The config of the run that a checkpoint or a prompt is from."""
    folders = checkpoint.absolute().parents[:2]
    return next((path for folder in folders if (path := folder / "config.yaml").is_file()), None)


def read_run_config(path: Path) -> RunConfig:
    """The settings of a config that a command may take without being asked.

    Raises:
        ValueError: If the file is no config, or model, data or backbone name classes that files may not name.
    """
    config = read_yaml(path)
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} holds no settings, but {shorten(config)}")
    try:
        check_plain(config)
        trainer, left_out = _read_trainer(config.get("trainer") or {})
        run = _read_run(config.get("run") or {}, path)
        values = {**_read_nouns(config), **_some("trainer", trainer), **_some("run", run)}
        _refuse_large_counts(values, "")
        _refuse_strange_indexes(values.get("data"), "data")
    except ValueError as error:
        raise ValueError(
            f"{path}, the config of the checkpoint's run, is not taken: {error}. To take it as it is, name it: "
            f"--config {path}"
        ) from error
    return RunConfig(path, values, left_out)


def _refuse_large_counts(value: Any, place: str) -> None:
    """Refuses numbers of processes that would exhaust the machine, or wait for other machines.

    Raises:
        ValueError: Naming the setting.
    """
    name = place.rpartition(".")[2]
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_large_counts(inner, f"{place}.{key}" if place else str(key))
    elif name in COUNTS:
        counts = [len(value)] if isinstance(value, list) else re.findall(r"\d+", str(value))
        if any(int(count) > COUNTS[name] for count in counts):
            raise ValueError(f"{place}: expected at most {COUNTS[name]}, got {shorten(value)}")


def _refuse_strange_indexes(value: Any, place: str) -> None:
    """Refuses to build an index where the config says, to load an encoder or to call a server that it alone names.

    Raises:
        ValueError: Naming the setting.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return
    arguments = value.get("init_args", value)
    if isinstance(settings := arguments.get("index_settings"), Mapping):
        refuse_strange_names(f"{place}.index_settings", settings)
    index = _index_of(arguments.get("retriever"))
    if index is not None and arguments.get("corpus") is not None and not (index / MANIFEST).is_file():
        raise ValueError(f"{place}: it builds the index {index}, which does not exist")
    for name, inner in value.items():
        _refuse_strange_indexes(inner, f"{place}.{name}")


def _index_of(retriever: Any) -> Path | None:
    """The folder of a retriever's index."""
    arguments = retriever.get("init_args", retriever) if isinstance(retriever, Mapping) else {}
    return Path(arguments["index"]).expanduser() if "index" in arguments else None


def _some(noun: str, values: dict[str, Any]) -> dict[str, Any]:
    return {noun: values} if values else {}


def _read_nouns(config: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for noun, base in (("model", SoftPromptModule), ("data", SoftPromptDataModule)):
        if config.get(noun) is not None:
            values[noun] = as_config(read_class(config[noun], base, noun))
    if config.get("backbone") is not None:
        spec = read_value(config["backbone"], BackboneSpec, "backbone")
        values["backbone"] = as_config(dict(spec.arguments))
    if config.get("replicas") is not None:
        values["replicas"] = _as_fields(read_value(config["replicas"], int | ReplicaSpec, "replicas"))
    if config.get("seed_everything") is not None:
        values["seed_everything"] = read_value(config["seed_everything"], bool | int, "seed_everything")
    return values


def _as_fields(value: Any) -> Any:
    return as_config(value if isinstance(value, int) else dict(value.arguments))


def _read_trainer(trainer: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain settings of the trainer, registered classes, and what is left out."""
    if not isinstance(trainer, Mapping):
        raise ValueError(f"trainer: expected settings, got {shorten(trainer)}")
    taken: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in trainer.items():
        place = f"trainer.{name}"
        if value is None or name in ELSEWHERE:
            continue
        if isinstance(value, PLAIN) and (not isinstance(value, str) or WORD.fullmatch(value)):
            taken[name] = value
        elif name in OF_CLASSES:
            try:
                taken[name] = _read_objects(value, place)
            except ValueError as error:
                left_out[place] = str(error)
        elif isinstance(value, list) and all(type(one) in (bool, int, float) for one in value):
            taken[name] = value
        else:
            left_out[place] = f"{place}: expected a plain setting, got {shorten(value)}"
    return taken, left_out


def _read_objects(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [as_config(read_class(one, object, f"{place}[{i}]")) for i, one in enumerate(value)]
    return as_config(read_class(value, object, place))


def _read_run(run: Any, path: Path) -> dict[str, Any]:
    """Settings of the run; where it leaves its files only if the config lies in that folder itself."""
    if not isinstance(run, Mapping):
        raise ValueError(f"run: expected settings, got {shorten(run)}")
    given = {name: value for name, value in run.items() if name not in PLACES}
    spec = dict(read_arguments(RunSpec, given, "run").arguments)
    folder = Path(spec.get("folder", "runs"), spec.get("experiment", "default"))
    if folder.absolute().resolve() == path.parent.parent.resolve():
        return spec
    return {name: spec[name] for name in ("skip_bad_steps", "halve_on_oom", "keep_last") if name in spec}
