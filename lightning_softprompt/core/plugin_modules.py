"""Imports the folders of plug-ins."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import walk_packages


@cache
def import_modules(package: str) -> None:
    """Imports all modules of a package and its subpackages: a class in a new file is known without any other edit."""
    for module in walk_packages(import_module(package).__path__, f"{package}."):
        import_module(module.name)
