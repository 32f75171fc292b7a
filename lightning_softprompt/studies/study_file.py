"""The file format of studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from lightning_softprompt.studies.options import Options, parse_arguments
from lightning_softprompt.studies.study import Study
from lightning_softprompt.system.plain_yaml import read_yaml

KEYS = ("folder", "common", "stages", "compare", "repeat", "tests", "metrics")
MAX_COMBINATIONS = 10_000


def read_study(path: Path, folder: Path | None = None, arguments: Sequence[str] = ()) -> Study:
    """Reads a study file.

    Args:
        path: The YAML file.
        folder: Folder of the runs; None for the folder in the file, or else `studies/<name of the file>`.
        arguments: Further options of all runs, as on the command line.

    Raises:
        ValueError: If the file does not exist or is not a study.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; list the studies of this project with `softprompt configs`")
    values = _read_mapping(path)
    file_folder = values.pop("folder", Path("studies", path.stem))
    common = values.pop("common", None) or {}
    _check_options(path, {"common": common})
    for key in ("compare", "repeat"):
        if key in values:
            values[key] = combinations(values[key] or {})
    for key in ("stages", "tests"):
        options_by_name = _read_options_by_name(path, key, values.pop(key, None) or {})
        if options_by_name:
            values[key] = options_by_name
    values["metrics"] = values.get("metrics") or ()
    common = {**common, **parse_arguments(arguments)}
    return Study(folder=folder or Path(file_folder), common=common, **values)


def _read_mapping(path: Path) -> dict[str, Any]:
    values = read_yaml(path) or {}
    if not isinstance(values, dict) or not set(values) <= set(KEYS):
        content = list(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} must be a mapping with keys out of {list(KEYS)}, got {content}")
    return values


def _read_options_by_name(path: Path, key: str, value: Any) -> dict[str, Options]:
    """Reads the options of each stage or test."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} must map names to options, such as {{source: {{}}}}, got {value}")
    options_by_name = {str(name): options or {} for name, options in value.items()}
    _check_options(path, options_by_name)
    return options_by_name


def _check_options(path: Path, options_by_name: Mapping[str, Any]) -> None:
    invalid = [name for name, options in options_by_name.items() if not isinstance(options, dict)]
    if invalid:
        raise ValueError(
            f"{path}: {', '.join(invalid)} must be a mapping from options to values, such as {{trainer.max_steps: 200}}"
        )


def combinations(value: Any) -> list[Options]:
    """Returns all combinations of lists of values by option; a list of options is returned unchanged.

    Raises:
        ValueError: If the value is neither, or there are too many combinations.

    >>> combinations({"data.shots": [8], "seed_everything": [1, 2]})
    [{'data.shots': 8, 'seed_everything': 1}, {'data.shots': 8, 'seed_everything': 2}]
    """
    if isinstance(value, list) and value and all(isinstance(options, dict) for options in value):
        return value
    if not isinstance(value, dict) or not value or not all(map(_is_list_of_values, value.values())):
        raise ValueError(
            "compare and repeat require lists of values by option, such as {data.seed: [1, 2]}, or a list of options, "
            f"got {value}"
        )
    count = prod(map(len, value.values()))
    if count > MAX_COMBINATIONS:
        raise ValueError(f"compare and repeat have {count:,} combinations; at most {MAX_COMBINATIONS:,} are possible")
    return [dict(zip(value, combination, strict=True)) for combination in product(*value.values())]


def _is_list_of_values(value: Any) -> bool:
    return isinstance(value, list) and bool(value)
