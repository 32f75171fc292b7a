"""Explains why a class outside the package cannot be used: its module, its name or its base class is wrong."""

from __future__ import annotations

import re
import traceback
from importlib import import_module

from lightning_softprompt.cli.parsing.class_options import did_you_mean

CLASS_PATH = re.compile(r"(?:Problem with given class_path '|Expected a path but )([A-Za-z_]\w*(?:\.\w+)+)")
GIVEN_PATH = re.compile(r"Given value: ([A-Za-z_]\w*(?:\.\w+)+)$", re.MULTILINE)
BASE = re.compile(r"does not correspond to a subclass of ([\w.]+)")
SYNTAX_ERROR = re.compile(r"\(\S+\.py, line \d+\)")
PACKAGE = "lightning_softprompt"


def explain_plugin_import(message: str) -> tuple[str, str] | None:
    """Imports the innermost class that an error names, and explains why it cannot be used: the problem and the fix.

    Returns:
        None if the message names no class of another package, or if the class can be imported.
    """
    bases = list(dict.fromkeys(BASE.findall(message)))
    is_about_value = bases or SYNTAX_ERROR.search(message)  # these errors may not repeat the path
    named = [*CLASS_PATH.findall(message), *(GIVEN_PATH.findall(message) if is_about_value else ())]
    paths = [path for path in named if path.partition(".")[0] != PACKAGE]
    if not paths:
        return None
    path = paths[-1]
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except Exception as error:  # the code of a user may raise anything
        return _explain_module(path, module_name, error)
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if _is_defined_in(value, module_name)]
        problem = f"the module {module_name} has no class {name!r}{did_you_mean(name, classes)}"
        return problem, f"classes of {module.__file__}: {', '.join(classes) or 'none'}"
    ancestors = {cls.__name__ for cls in getattr(getattr(module, name), "__mro__", ())}
    if not bases or ancestors.intersection(base.rpartition(".")[2] for base in bases):
        return None
    names = " or ".join(bases)
    return f"{path} is not a subclass of {names}", f"the option requires a class that derives from {names}"


def _explain_module(path: str, module_name: str, error: Exception) -> tuple[str, str]:
    packages = [module_name.rsplit(".", depth)[0] for depth in range(module_name.count(".") + 1)]
    if isinstance(error, ModuleNotFoundError) and error.name in packages:
        return (
            f"{path}: there is no module {error.name!r} on the import path",
            "use `python -m lightning_softprompt` for a file in the current folder, or add its folder to PYTHONPATH",
        )
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
        place = f"{frames[-1].filename}:{frames[-1].lineno}"
    return f"the module {module_name} cannot be imported: {type(error).__name__}: {error}", f"the error is at {place}"


def _is_defined_in(value: object, module_name: str) -> bool:
    return isinstance(value, type) and value.__module__ == module_name
