"""Constructor arguments as plain values, so that a checkpoint is safe to load and describes its module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule

from lightning_softprompt.checkpoints.safe_loading.registry import class_path


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
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [to_plain(item) for item in value]
    return _object_to_plain(value)


def _object_to_plain(value: Any) -> dict[str, Any]:
    """Converts a class, a dataclass, a partial of a class, or a module with plain hyperparameters."""
    if isinstance(value, type):
        return {"class_path": class_path(value)}
    if is_dataclass(value):
        arguments = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        return {"class_path": class_path(type(value)), "init_args": arguments}
    if isinstance(value, LightningModule):
        arguments = {name: item for name, item in value.hparams.items() if not name.startswith("_")}
        return {"class_path": class_path(type(value)), "init_args": arguments}
    if isinstance(value, partial) and (cls := class_of(value)) is not None:
        return {"class_path": class_path(cls), "init_args": to_plain(value.keywords)}
    raise ValueError(
        f"{value!r} cannot be saved in a checkpoint as plain values; pass a class or functools.partial(AdamW, lr=0.1) "
        f"instead of a lambda, and a dataclass instead of another object"
    )


def class_of(value: Any) -> type | None:
    """Returns the class that a class or a partial of a class creates; None for other values."""
    candidates = (value.func, *value.args) if isinstance(value, partial) else (value,)
    # jsonargparse passes the class as an argument of its function
    return next((candidate for candidate in candidates if isinstance(candidate, type)), None)


def save_plain_hyperparameters(module: LightningModule, frame: FrameType | None, leave_out: Sequence[str] = ()) -> None:
    """Saves the arguments of a module's `__init__` as plain hyperparameters.

    They have the same form on the command line and in Python, so that `load_from_checkpoint` can rebuild the module.
    """
    module.save_hyperparameters(frame=frame, ignore=leave_out, logger=False)
    for name, value in module.hparams.items():
        module.hparams[name] = to_plain(value)
    module.hparams.setdefault("_class_path", class_path(type(module)))
    module.hparams.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")
