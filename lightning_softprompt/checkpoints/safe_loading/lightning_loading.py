"""Replaces a function of Lightning, so that its `load_from_checkpoint` creates methods only from checked arguments.

Lightning uses jsonargparse, which calls any function that a value of type `Callable` names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch.cli

from lightning_softprompt.checkpoints.safe_loading.method_spec import create_method, method_base, read_method
from lightning_softprompt.checkpoints.safe_loading.plain_values import PLAIN
from lightning_softprompt.checkpoints.safe_loading.registry import PACKAGE, class_path
from lightning_softprompt.system.trust import trust_modules

_lightning_instantiate_module = lightning.pytorch.cli.instantiate_module


def replace_instantiate_module() -> None:
    """Replaces Lightning's `instantiate_module`, which Lightning looks up by name."""
    lightning.pytorch.cli.instantiate_module = instantiate_module


def instantiate_module(class_type: type[Any], config: dict[str, Any]) -> Any:
    """Creates the module of a checkpoint. Methods are created by this package, other modules by Lightning."""
    path = config.get("_class_path", class_path(class_type))
    module, _, name = str(path).rpartition(".")
    imported = getattr(sys.modules.get(module), name, class_type)
    cls = imported if isinstance(imported, type) else class_type
    if not _is_from_package(cls) and not issubclass(cls, method_base()):
        return _lightning_instantiate_module(class_type, config)
    plain_types = (*PLAIN, Mapping, list, tuple)
    objects = {name: value for name, value in config.items() if not isinstance(value, plain_types)}
    with trust_modules(module_to_trust(cls)):
        spec = read_method({**config, "_class_path": path}, "the checkpoint", objects)
    return create_method(spec, "the checkpoint", objects)


def module_to_trust(cls: type) -> list[str]:
    """Returns the module of a class outside this package: the caller has imported it, so it is trusted."""
    return [] if _is_from_package(cls) else [cls.__module__]


def _is_from_package(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == PACKAGE
