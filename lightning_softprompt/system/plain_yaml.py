"""Reads YAML files as plain values, and refuses small files that describe huge values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 16 * 2**20
MAX_VALUES = 200_000  # including values that aliases repeat
MAX_DEPTH = 60
MAX_DIGITS = 1000
# the parser in C reads the config of a run ten times as fast, which `softprompt runs` needs
Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxXoO_.:+-]*")


class TooLargeError(yaml.YAMLError, ValueError):
    """YAML with more values, or more levels, than any config has."""


def read_yaml(path: Path) -> Any:
    """Reads the values of a YAML file.

    Raises:
        ValueError: Naming the file, and the line if it is known.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES // 2**20} MiB, which is too large for a config")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    return load_yaml(text, str(path))


def load_yaml(text: str, name: str = "the YAML text") -> Any:
    """Reads the values of YAML text.

    Args:
        text: One document.
        name: Its name in errors.

    Raises:
        ValueError: If it is not valid, or its values are too many, too deep or too long.
    """
    try:
        check_size(text)
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = 0 if error.problem_mark is None else error.problem_mark.line + 1
        raise ValueError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except TooLargeError as error:
        raise ValueError(f"{name}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from error


def guard_loader(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns a function that loads YAML, and first refuses text whose values would be huge."""

    def load_small(text: str) -> Any:
        if "*" in text or len(text) > MAX_DIGITS:  # only such text can have huge values
            check_size(text)
        return load(text)

    return load_small


def check_size(text: str) -> None:
    """Refuses text whose values would be huge, before any value is created: aliases repeat parts of a document.

    Raises:
        TooLargeError: With the line.
        yaml.YAMLError: If the text is not valid.
    """
    size = _Size()
    for event in yaml.parse(text, Loader=Loader):
        try:
            size.add(event)
        except ValueError as error:
            line = 0 if event.start_mark is None else event.start_mark.line + 1
            raise TooLargeError(f"line {line}: {error}") from error


class _Size:
    """The number of values of a document so far, including those that aliases repeat."""

    def __init__(self) -> None:
        self.count = 0
        self.of_anchors: dict[str | None, int] = {}
        self.open_parts: list[tuple[str | None, int]] = []  # anchor, and the number of values before it

    def add(self, event: yaml.Event) -> None:
        """Counts an event of the parser."""
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.open_parts.pop()
            self.of_anchors[anchor] = self.count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in self.open_parts):
                raise ValueError(f"the alias *{event.anchor} is part of itself")
            self.count += self.of_anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            self._add_node(event)
        if self.count > MAX_VALUES or len(self.open_parts) > MAX_DEPTH:
            limit = f"{MAX_VALUES:,} values" if self.count > MAX_VALUES else f"{MAX_DEPTH} levels"
            raise ValueError(f"it has more than {limit}, including what its aliases repeat")

    def _add_node(self, event: yaml.NodeEvent) -> None:
        self.of_anchors[event.anchor] = 1
        if isinstance(event, yaml.CollectionStartEvent):
            self.open_parts.append((event.anchor, self.count))
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > MAX_DIGITS:
            _refuse_number(event.value)
        self.count += 1


def _refuse_number(text: str) -> None:
    """Refuses digits that Python would take long to convert to a number."""
    if NUMBER.fullmatch(text):
        raise ValueError(f"a number of {len(text):,} digits")
