"""The config of a checkpoint's run: only its plain values and registered classes are used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_softprompt.checkpoints.safe_loading.arguments import read_arguments, read_class, read_value
from lightning_softprompt.checkpoints.safe_loading.class_spec import as_config
from lightning_softprompt.checkpoints.safe_loading.plain_values import PLAIN, check_plain
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.renamed_options import rename_keys
from lightning_softprompt.retrieval.manifest import NAME as MANIFEST
from lightning_softprompt.retrieval.trusted_names import check_trusted_names
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.system.plain_yaml import read_yaml
from lightning_softprompt.system.printable import shorten
from lightning_softprompt.training.replicas import ReplicaSpec

WORD = re.compile(r"[\w:+,-]*")  # a trainer setting by name, such as bf16-mixed; never an import path or a file
IGNORED_TRAINER_SETTINGS = ("default_root_dir", "model_registry")  # output locations
CLASS_SETTINGS = ("callbacks", "logger", "plugins", "profiler", "strategy", "accelerator")
MAX_COUNTS = {
    "devices": 64,
    "num_nodes": 1,
    "num_workers": 64,
    "replicas": 1000,
    "count": 1000,
    "num_classes": 1000,  # metrics allocate a matrix of classes, or a curve of thresholds for each class
    "thresholds": 1000,
    "n_bins": 1000,
}
COMMAND_SETTINGS = ("predictions", "name", "display_name", "job_type")  # run settings that belong to one command


@dataclass(frozen=True)
class RunConfig:
    """The settings that a command takes from the config of a run.

    Args:
        path: The config file.
        values: Plain values, with registered classes by their full import paths.
        left_out: Ignored settings, with the reason.
    """

    path: Path
    values: Mapping[str, Any]
    left_out: Mapping[str, str]

    @property
    def text(self) -> str:
        """The values as a config for the command line."""
        return json.dumps(self.values)


def config_beside(checkpoint: Path) -> Path | None:
    """The config of the run that a checkpoint or a prompt belongs to."""
    folders = checkpoint.absolute().parents[:2]
    return next((path for folder in folders if (path := folder / "config.yaml").is_file()), None)


def read_run_config(path: Path) -> RunConfig:
    """Read the settings of a config that are safe to use without an explicit option.

    Raises:
        ValueError: If the file is not a config, or model, data or backbone name classes that are not registered.
    """
    config = rename_keys(read_yaml(path))
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} is not a config, but {shorten(config)}")
    try:
        check_plain(config)
        trainer, left_out = _read_trainer(config.get("trainer") or {})
        run = _read_run(config.get("run") or {}, path)
        values = _read_components(config)
        if trainer:
            values["trainer"] = trainer
        if run:
            values["run"] = run
        _refuse_large_counts(values, "")
        _refuse_strange_indexes(values.get("data"), "data")
    except ValueError as error:
        raise ValueError(
            f"{path}, the config of the checkpoint's run, is not used: {error}. To use it anyway, pass it: "
            f"--config {path}"
        ) from error
    return RunConfig(path, values, left_out)


def _refuse_large_counts(value: Any, place: str) -> None:
    """Refuse numbers that would exhaust the machine, or wait for other machines.

    Raises:
        ValueError: Naming the setting.
    """
    name = place.rpartition(".")[2]
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_large_counts(inner, f"{place}.{key}" if place else str(key))
    elif name in MAX_COUNTS:
        counts = [len(value)] if isinstance(value, list) else re.findall(r"\d+", str(value))
        if any(int(count) > MAX_COUNTS[name] for count in counts):
            raise ValueError(f"{place}: expected at most {MAX_COUNTS[name]}, got {shorten(value)}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _refuse_large_counts(item, f"{place}[{position}]")


def _refuse_strange_indexes(value: Any, place: str) -> None:
    """Refuse an index to be built, an encoder to be loaded, or a server to be called that only the config names.

    Raises:
        ValueError: Naming the setting.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return
    arguments = value.get("init_args", value)
    if isinstance(settings := arguments.get("index_settings"), Mapping):
        check_trusted_names(f"{place}.index_settings", settings)
    index = _index_of(arguments.get("retriever"))
    if index is not None and arguments.get("corpus") is not None and not (index / MANIFEST).is_file():
        raise ValueError(f"{place}: the index {index} does not exist and would be built")
    for name, inner in value.items():
        _refuse_strange_indexes(inner, f"{place}.{name}")


def _index_of(retriever: Any) -> Path | None:
    """The folder of a retriever's index."""
    arguments = retriever.get("init_args", retriever) if isinstance(retriever, Mapping) else {}
    return Path(arguments["index"]).expanduser() if "index" in arguments else None


def _read_components(config: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for component, base in (("model", SoftPromptModule), ("data", SoftPromptDataModule)):
        if config.get(component) is not None:
            values[component] = as_config(read_class(config[component], base, component))
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
    """Read the plain settings and registered classes of the trainer, and collect those that are ignored."""
    if not isinstance(trainer, Mapping):
        raise ValueError(f"trainer: expected settings, got {shorten(trainer)}")
    settings: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in trainer.items():
        place = f"trainer.{name}"
        if value is None or name in IGNORED_TRAINER_SETTINGS:
            continue
        if isinstance(value, PLAIN) and (not isinstance(value, str) or WORD.fullmatch(value)):
            settings[name] = value
        elif name in CLASS_SETTINGS:
            try:
                settings[name] = _read_objects(value, place)
            except ValueError as error:
                left_out[place] = str(error)
        elif isinstance(value, list) and all(type(one) in (bool, int, float) for one in value):
            settings[name] = value
        else:
            left_out[place] = f"{place}: expected a plain setting, got {shorten(value)}"
    return settings, left_out


def _read_objects(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [as_config(read_class(one, object, f"{place}[{i}]")) for i, one in enumerate(value)]
    return as_config(read_class(value, object, place))


def _read_run(run: Any, path: Path) -> dict[str, Any]:
    """Read the settings of the run; its folder is used only if the config is in that folder."""
    if not isinstance(run, Mapping):
        raise ValueError(f"run: expected settings, got {shorten(run)}")
    arguments = {name: value for name, value in run.items() if name not in COMMAND_SETTINGS}
    spec = dict(read_arguments(RunSpec, arguments, "run").arguments)
    folder = Path(spec.get("folder", "runs"), spec.get("experiment", "default"))
    if folder.absolute().resolve() == path.parent.parent.resolve():
        return spec
    return {name: spec[name] for name in ("skip_bad_steps", "halve_on_oom", "keep_last") if name in spec}
