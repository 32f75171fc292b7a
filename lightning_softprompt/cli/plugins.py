"""Discovers the plug-ins of the package, so that configs may name their classes without the module's path."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import walk_packages

from lightning_softprompt.checkpoints.registry import PACKAGE, PLUGIN_FOLDERS


@cache
def import_plugins() -> None:
    """Imports every module of the plug-in folders: a class in a file of its own is known without any other edit."""
    for folder in PLUGIN_FOLDERS:
        package = import_module(f"{PACKAGE}.{folder}")
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
