"""The method that a file describes: reads its class and arguments, and creates it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_softprompt.checkpoints.safe_loading.arguments import read_arguments, read_class
from lightning_softprompt.checkpoints.safe_loading.class_spec import ClassSpec, build
from lightning_softprompt.checkpoints.safe_loading.plain_values import check_names, check_plain
from lightning_softprompt.checkpoints.safe_loading.registry import class_path, package_base
from lightning_softprompt.renamed_options import rename_keys

NOT_ARGUMENTS = ("_class_path", "_instantiator", "replicas", "evaluation", "data")


def read_method(
    method: Mapping[str, Any], path: Path | str, leave_out: Iterable[str] = (), base: type | None = None
) -> ClassSpec:
    """Reads the description of a method and checks all arguments, without creating anything.

    Args:
        method: `_class_path` and arguments.
        path: The file, for messages.
        leave_out: Arguments that are not needed.
        base: The required class or base class; None for any method.

    Raises:
        ValueError: Naming the file and the invalid value.
    """
    if "_class_path" not in method:
        raise ValueError(f"{path} does not name its method")
    left_out = {*NOT_ARGUMENTS, *leave_out}
    try:
        check_plain(method, "its description of the method")
        arguments = {name: value for name, value in method.items() if name not in left_out}
        arguments = rename_keys(arguments)
        for name in left_out & set(method):
            check_names(method[name], name)
        if base is not None and method["_class_path"] == class_path(base):
            return read_arguments(base, arguments, "")
        description = {"class_path": method["_class_path"], "init_args": arguments}
        return read_class(description, base or method_base(), "")
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).removeprefix(': ')}") from error


def create_method(spec: ClassSpec, path: Path | str, overrides: Mapping[str, Any] | None = None) -> Any:
    """Creates the method of checked arguments.

    Args:
        spec: Class and arguments.
        path: The file, for messages.
        overrides: Arguments that replace those of the file.

    Raises:
        ValueError: If the class refuses the arguments.
    """
    try:
        arguments = {name: build(value) for name, value in spec.arguments.items()}
        return spec.cls(**{**arguments, **(overrides or {})})
    except Exception as error:  # constructors raise various errors on values of the right type
        raise ValueError(f"{path} cannot be loaded: {spec.cls.__name__}: {error}") from error


def method_base() -> type:
    """Returns the base class of methods, whose module imports this one."""
    return package_base("methods.base.SoftPromptModule")
