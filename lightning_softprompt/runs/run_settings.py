"""The settings of a command that determine training: checkpoints store them, and processes compare them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Protocol, cast

from lightning import LightningDataModule
from lightning.fabric.connector import _convert_precision_to_unified_args

from lightning_softprompt.checkpoints.run_settings import covers

Config = Mapping[str, Any]

# Locations and loading of rows. Only their content matters, for which the data module provides a digest. The batch
# size over all processes is part of the state of the batch order.
NOT_DATA = {
    "backbone", "batch_size", "cache", "corpus", "eval_batch_size", "index", "num_workers", "on_bad_row", "path",
    "predict", "test", "train", "url", "validation",
}  # fmt: skip
TRAINER = {  # with the values that Lightning uses for None
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": "norm",
    "precision": "32-true",
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "reload_dataloaders_every_n_epochs": 0,
    "deterministic": False,
}
MONITOR = ("run.monitor", "run.monitor_mode")
BACKBONE = ("dtype", "linear_backend")  # weights are compared by their fingerprint
# Data options that are groups of options, not mappings of names.
GROUPS = ("retriever", "index_settings", "passages", "answer_form")
PASSIVE = {  # callbacks that do not change training
    "BatchSizeFinder", "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary",
    "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar", "SpikeDetection", "Timer",
    "ThroughputMonitor", "TQDMProgressBar",
}  # fmt: skip
STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class Data(Protocol):
    """The part of a data module that is used here."""

    def rows_digest(self, name: Any) -> str:
        """The number of a split's rows and a digest of them."""


class CommandSettings:
    """The settings of one command.

    Args:
        config: Its config as plain values.
        data: Its data module.
        command: `fit`, `validate`, `test` or `predict`.
        monitor: The metric that selects the best prompt, and whether its minimum or maximum is best.
        left_out: Names of settings that are not in the config, such as objects that were passed in Python. They cannot
            be compared.
    """

    def __init__(
        self,
        config: Config,
        data: LightningDataModule,
        command: str,
        monitor: tuple[str, str] | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        self.config, self.data, self.command, self.monitor = config, data, command, monitor
        self.left_out = left_out

    @cached_property
    def of_config(self) -> dict[str, Any]:
        """The settings that do not depend on the rows."""
        monitor = {} if self.monitor is None else dict(zip(MONITOR, self.monitor, strict=True))
        settings = {**config_settings(self.config), **monitor}
        return {name: settings[name] for name in settings if not any(covers(left, name) for left in self.left_out)}

    @cached_property
    def of_rows(self) -> dict[str, str]:
        """The digests of the rows that the command uses, by the name of their split."""
        data = cast(Data, self.data)
        return {f"{split}_rows": data.rows_digest(split) for split in STAGES[self.command]}

    @cached_property
    def all_settings(self) -> dict[str, Any]:
        """The settings in checkpoints: the settings of the config, and digests of the rows."""
        return {**self.of_config, **self.of_rows}

    @cached_property
    def process_settings(self) -> dict[str, Any]:
        """The settings that must be equal in all processes of a run."""
        seed = {"seed_everything": self.config.get("seed_everything")}
        return {**seed, **flatten_classes(self.config["model"], "model"), **self.all_settings}

    @property
    def prepares(self) -> bool:
        """Whether the data module builds something before it has its rows, such as an index."""
        return type(self.data).prepare_data is not LightningDataModule.prepare_data


def config_settings(config: Config) -> dict[str, Any]:
    """The settings of a config that determine training, except the settings of the model, as plain values by name."""
    options = flatten_classes(config["data"], "data")
    data_names = [name for name in options if name.rpartition(".")[2] not in NOT_DATA]
    data = {name: options[name] for name in data_names}
    backbone = {f"backbone.{name}": config["backbone"].get(name) for name in BACKBONE}
    trainer = trainer_settings(config["trainer"]) | length_settings(config)
    return data | backbone | trainer | replica_settings(config.get("replicas"))


def flatten_classes(value: Any, name: str) -> dict[str, Any]:
    """Flatten the arguments of a class and of nested classes to dotted names; other mappings are one value.

    Checkpoints store these names.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = value.get("init_args") or {}
        parts = [flatten_classes(inner, f"{name}.{key}") for key, inner in arguments.items()]
        parts.append({f"{name}.class_path": value["class_path"]})
    elif isinstance(value, Mapping) and name.rpartition(".")[2] in GROUPS:
        parts = [flatten_classes(inner, f"{name}.{key}") for key, inner in value.items()]
    elif isinstance(value, Mapping) and value and all(_is_class(inner) for inner in value.values()):
        parts = [flatten_classes(inner, f"{name}.{key}") for key, inner in value.items()]
        parts.append({f"{name}.names": list(value)})
    else:
        return {name: value}
    return {key: inner for part in parts for key, inner in part.items()}


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def trainer_settings(trainer: Config) -> dict[str, Any]:
    """The Trainer's arguments that change results: not limits of steps or time, loggers and paths."""
    values: dict[str, Any] = {
        name: default if trainer.get(name) is None else trainer[name] for name, default in TRAINER.items()
    }
    values["precision"] = _convert_precision_to_unified_args(values["precision"])
    if not values["gradient_clip_val"]:
        values |= {"gradient_clip_val": None, "gradient_clip_algorithm": TRAINER["gradient_clip_algorithm"]}
    callbacks = trainer.get("callbacks") or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    active = [one for one in listed if str(one.get("class_path")).rpartition(".")[2] not in PASSIVE]
    return {f"trainer.{name}": value for name, value in {**values, "callbacks": active}.items()}


def length_settings(config: Config) -> dict[str, Any]:
    """The length of the training if its learning rate depends on it: a decay, or a warmup that is a share of it."""
    arguments = config.get("model", {}).get("init_args", {})
    decays = arguments.get("lr_schedule", "constant") != "constant"
    if not decays and not 0 < arguments.get("warmup", 0) < 1:
        return {}
    return {f"trainer.{name}": config["trainer"].get(name) for name in ("max_steps", "max_epochs")}


def replica_settings(replicas: Any) -> dict[str, Any]:
    """The settings that differ between replicas; their number is an argument of the model."""
    values = replicas if isinstance(replicas, Mapping) else {}
    return {f"replicas.{name}": values.get(name) for name in ("seeds", "learning_rates", "inits")}
