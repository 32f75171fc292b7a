"""Classes that options name, and the names of their options, for messages."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module

PYTHON_ONLY = {"data"}  # arguments of methods that the command line sets by links
LINKED = {  # options of the model and the data that links set, by the option of the class
    "model": ("backbone", "classes", "classes_by_task", "evaluation"),
    "data": ("backbone",),
}


def did_you_mean(name: str, known: list[str]) -> str:
    """A question that names the known names most similar to a name; empty if there are none."""
    close = get_close_matches(name, known, n=2, cutoff=0.6)
    return f". Did you mean {' or '.join(map(repr, close))}?" if close else ""


def import_class(path: str) -> type:
    """Import a class by its path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def concrete_subclasses(cls: type) -> Iterator[type]:
    """Yield all subclasses of a class that can be instantiated."""
    sub: type
    for sub in cls.__subclasses__():
        if not inspect.isabstract(sub):
            yield sub
        yield from concrete_subclasses(sub)


def option_names(path: str) -> list[str]:
    """Names of a class's constructor arguments; for classes of this package, including those passed to base classes."""
    cls = import_class(path)
    if not cls.__module__.startswith("lightning_softprompt"):
        return parameter_names(cls)
    known = [name for base in cls.__mro__[:-1] if "__init__" in vars(base) for name in _package_arguments(base)]
    return [name for name in dict.fromkeys(known) if name not in PYTHON_ONLY]


def _package_arguments(cls: type) -> list[str]:
    return parameter_names(cls) if cls.__module__.startswith("lightning_softprompt") else []


def parameter_names(cls: type) -> list[str]:
    """Names of the arguments of a class's constructor, without those passed to base classes."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return [p.name for p in parameters if p.name != "self" and p.kind not in kinds]
