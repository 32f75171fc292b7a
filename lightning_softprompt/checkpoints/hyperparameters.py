"""Constructor arguments as plain values, so that a checkpoint is safe to load and describes its module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule


def to_plain(value: Any) -> Any:
    """Converts a value to the form of a config file: objects become `class_path` and `init_args`, paths become text.

    Raises:
        ValueError: If a value has no such form, such as a lambda.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [to_plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "class_path": _path(type(value)),
            "init_args": {f.name: to_plain(getattr(value, f.name)) for f in fields(value)},
        }
    if isinstance(value, partial) and (
        made := next((a for a in (value.func, *value.args) if isinstance(a, type)), None)
    ):
        return {
            "class_path": _path(made),
            "init_args": to_plain(value.keywords),
        }  # jsonargparse hides the class in args
    if isinstance(value, type):
        return {"class_path": _path(value)}
    raise ValueError(
        f"{value!r} cannot be kept in a checkpoint as plain values; pass a class or functools.partial(AdamW, lr=0.1) "
        f"instead of a lambda, and a dataclass instead of another object"
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def save_plain_hyperparameters(module: LightningModule, frame: FrameType | None, leave_out: Sequence[str] = ()) -> None:
    """Saves the arguments of a module's `__init__` as plain hyperparameters.

    They have the same form on the command line and in Python, so that `load_from_checkpoint` can rebuild the module.
    """
    module.save_hyperparameters(frame=frame, ignore=leave_out, logger=False)
    for name, value in module.hparams.items():
        module.hparams[name] = to_plain(value)
    module.hparams.setdefault("_class_path", _path(type(module)))
    module.hparams.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")
