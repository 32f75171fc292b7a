"""`--trust MODULE`, an option of every command: modules whose classes files may name, like those of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points

from lightning_softprompt.system.errors import CommandError

OPTION = "--trust"
ENTRY_POINTS = "lightning_softprompt.plugins"  # group in which an installed distribution names modules with plug-ins
VARIABLE = "SOFTPROMPT_TRUST"  # keeps the modules for this process and for those that it starts


def parse_trust_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the modules that a command trusts, and its arguments without them.

    Raises:
        CommandError: If a module is missing.
    """
    modules: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, is_joined, value = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        module = value if is_joined else next(words, "")
        if not module or module.startswith("-"):
            raise CommandError(f"{OPTION} expects a module, such as my_package.methods")
        modules.append(module)
    return modules, rest


@contextmanager
def trust_modules(modules: Iterable[str]) -> Iterator[None]:
    """Allows files to name classes of these modules and of their submodules within the context.

    Raises:
        CommandError: If one is not the name of a module that can define plug-ins.
    """
    added = list(modules)
    for module in added:
        is_path = all(part.isidentifier() for part in module.split("."))
        if not is_path or is_standard(module):
            raise CommandError(
                f"{OPTION} expects the import path of a module that defines plug-ins, such as my_package.methods, got "
                f"{module!r}"
            )
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*user_modules(), *added]))
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def is_trusted(path: str) -> bool:
    """Whether an import path belongs to a module that the user trusts."""
    trusted = (*user_modules(), *_of_distributions())
    return any(path == module or path.startswith(f"{module}.") for module in trusted)


def is_standard(path: str) -> bool:
    """Whether an import path is one of the standard library, whose functions can do anything."""
    return path.partition(".")[0] in sys.stdlib_module_names


def user_modules() -> list[str]:
    """The modules that the user trusts with `--trust` or the environment variable."""
    return [module for module in os.environ.get(VARIABLE, "").split(",") if module]


@cache
def _of_distributions() -> tuple[str, ...]:
    """Modules that installed distributions register."""
    return tuple(entry.module for entry in entry_points(group=ENTRY_POINTS))
