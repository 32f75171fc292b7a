"""Options of a run command by name, and as arguments on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST_VALUE = 40  # characters of a value in the description of options
Options = Mapping[str, Any]  # by name, without the dashes


def to_arguments(options: Options) -> list[str]:
    """Returns options as arguments: configs first, and the name of a class before the options of the class.

    >>> to_arguments({"model.length": 5, "model": "MPT", "data.labels": {"a": "b"}})
    ['--model=MPT', '--model.length=5', '--data.labels={"a": "b"}']
    """
    names = sorted(options, key=lambda name: (name != "config", name.count(".")))
    return [f"--{name}={to_text(options[name])}" for name in names]


def to_text(value: Any) -> str:
    """Returns the value of an option as text."""
    return value if isinstance(value, str) else json.dumps(value)


def parse_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """Parses arguments into options by name.

    Raises:
        ValueError: If a value has no name, or a name no value.

    >>> parse_arguments(["--model", "MPT", "--model.length=5"])
    {'model': 'MPT', 'model.length': '5'}
    """
    options: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, value = argument.partition("=")
        has_value = bool(equals or remaining)
        if not name.startswith("--") or not has_value:
            raise ValueError(f"expected options such as --model MPT or --model.length=5, got {name!r}")
        options[name.removeprefix("--")] = value if equals else remaining.pop(0)
    return options


def describe_options(options: Options) -> str:
    """Returns options as a short text for people: names without their prefix, config files without their folder.

    >>> describe_options({"data.shots": 8, "model": "configs/method/dept.yaml"})
    'shots=8 model=dept'
    """
    texts = []
    for name, value in options.items():
        text = to_text(value)
        short = Path(text).stem if text.endswith(".yaml") else text
        texts.append(f"{name.rpartition('.')[2]}={short[:LONGEST_VALUE]}")
    return " ".join(texts)


def with_defaults(arguments: Sequence[str], defaults: Options) -> list[str]:
    """Returns the arguments of a command, and those options of `defaults` that they do not set.

    >>> with_defaults(["--run.group=mine"], {"run.group": "study", "run.job_type": "fit"})
    ['--run.group=mine', '--run.job_type=fit']
    """
    names = {argument.partition("=")[0] for argument in arguments}
    missing = {name: value for name, value in defaults.items() if f"--{name}" not in names}
    return [*arguments, *to_arguments(missing)]
