"""Which parts of a command decide what training does: the settings that checkpoints keep and processes compare."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol, cast

from lightning import LightningDataModule
from lightning.fabric.connector import _convert_precision_to_unified_args

Config = Mapping[str, Any]

# Where rows come from and how they are loaded. Their content counts, and the data module gives a digest of it. The
# order of batches keeps their size, over all processes.
NOT_DATA = {
    "backbone", "batch_size", "cache", "corpus", "eval_batch_size", "index", "num_workers", "on_bad_row", "path",
    "predict", "test", "train", "url", "validation",
}  # fmt: skip
TRAINER = {  # with the values that Lightning takes for None
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
BACKBONE = ("dtype", "compute")  # the weights go by their fingerprint
GROUPS = ("retriever", "index_settings")  # options of the data that are groups of options, and no mapping of names
PASSIVE = {  # callbacks that watch training and do not change it
    "BatchSizeFinder", "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary",
    "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar", "SpikeDetection", "Timer",
    "ThroughputMonitor", "TQDMProgressBar",
}  # fmt: skip
STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class Data(Protocol):
    """As much of a data module as is asked here."""

    def rows_digest(self, name: Any) -> str:
        """The number of a split's rows and a digest of them."""


class CommandSettings:
    """The settings of one command.

    Args:
        config: Its config, as plain values.
        data: Its data module.
        command: `fit`, `validate`, `test` or `predict`.
    """

    def __init__(self, config: Config, data: LightningDataModule, command: str) -> None:
        self.config, self.data, self.command = config, data, command

    @cached_property
    def of_config(self) -> dict[str, Any]:
        """What is known without the rows."""
        return config_settings(self.config)

    @cached_property
    def of_rows(self) -> dict[str, str]:
        """The digests of the rows that the command uses, by the name of their split."""
        data = cast(Data, self.data)
        return {f"{split}_rows": data.rows_digest(split) for split in STAGES[self.command]}

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What checkpoints keep: the config's settings, and digests of the rows."""
        return {**self.of_config, **self.of_rows}

    @cached_property
    def compared(self) -> dict[str, Any]:
        """What all processes of a run must have in common."""
        seed = {"seed_everything": self.config.get("seed_everything")}
        return {**seed, **flat(self.config["model"], "model"), **self.kept}

    @property
    def prepares(self) -> bool:
        """Whether the data module builds something before it has its rows, as an index."""
        return type(self.data).prepare_data is not LightningDataModule.prepare_data


def config_settings(config: Config) -> dict[str, Any]:
    """What of a command's config decides what training does, but for the model, as plain values by name."""
    data = {name: value for name, value in flat(config["data"], "data").items() if name.split(".")[-1] not in NOT_DATA}
    backbone = {f"backbone.{name}": config["backbone"].get(name) for name in BACKBONE}
    return {**data, **backbone, **trainer_settings(config["trainer"]), **replica_settings(config.get("replicas"))}


def flat(value: Any, name: str) -> dict[str, Any]:
    """The arguments of a class, and of classes among them, by dotted names; other values are kept whole."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = value.get("init_args") or {}
        parts = [flat(inner, f"{name}.{key}") for key, inner in arguments.items()]
        parts.append({f"{name}.class_path": value["class_path"]})
    elif isinstance(value, Mapping) and name.rpartition(".")[2] in GROUPS:
        parts = [flat(inner, f"{name}.{key}") for key, inner in value.items()]
    elif isinstance(value, Mapping) and value and all(_is_class(inner) for inner in value.values()):
        parts = [flat(inner, f"{name}.{key}") for key, inner in value.items()]
        parts.append({f"{name}.names": list(value)})
    else:
        return {name: value}
    return {key: inner for part in parts for key, inner in part.items()}


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def trainer_settings(trainer: Config) -> dict[str, Any]:
    """What of the Trainer's arguments changes results. Limits of steps and time do not, nor do loggers and paths."""
    values: dict[str, Any] = {
        name: default if trainer.get(name) is None else trainer[name] for name, default in TRAINER.items()
    }
    values["precision"] = _convert_precision_to_unified_args(values["precision"])
    if not values["gradient_clip_val"]:
        values |= {"gradient_clip_val": None, "gradient_clip_algorithm": TRAINER["gradient_clip_algorithm"]}
    callbacks = trainer.get("callbacks") or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    acting = [each for each in listed if str(each.get("class_path")).rpartition(".")[2] not in PASSIVE]
    return {f"trainer.{name}": value for name, value in {**values, "callbacks": acting}.items()}


def replica_settings(replicas: Any) -> dict[str, Any]:
    """How replicas differ; their number is an argument of the model."""
    values = replicas if isinstance(replicas, Mapping) else {}
    return {f"replicas.{name}": values.get(name) for name in ("seeds", "learning_rates", "inits")}
