"""Discovers the plug-ins of the package, so that configs can name their classes without a module path."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from jsonargparse._util import resolved_import_paths

import lightning_softprompt
from lightning_softprompt.checkpoints.safe_loading.registry import PACKAGE, PLUGIN_FOLDERS
from lightning_softprompt.core.plugin_modules import import_modules


@cache
def import_plugins() -> None:
    """Import every module of the plug-in folders."""
    for folder in PLUGIN_FOLDERS:
        import_modules(f"{PACKAGE}.{folder}")
    for name in lightning_softprompt.__all__:
        _keep_import_path(getattr(lightning_softprompt, name))


def _keep_import_path(value: object) -> None:
    """Name a class in configs by its shortest path below the package, as before the package exported it.

    jsonargparse uses the shortest path of all, but configs of different versions must be comparable.
    """
    if not isinstance(value, type):
        return
    parts = value.__module__.split(".")
    modules = (".".join(parts[:length]) for length in range(2, len(parts) + 1))
    exports = (module for module in modules if getattr(import_module(module), value.__name__, None) is value)
    resolved_import_paths.add(value, f"{next(exports)}.{value.__name__}")
