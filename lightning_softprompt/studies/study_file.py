"""The file of a study."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from lightning_softprompt.studies.study import Options, Study
from lightning_softprompt.system.plain_yaml import read_yaml

MAX_COMBINATIONS = 10_000


def read_study(path: Path, folder: Path | None = None, options: Sequence[str] = ()) -> Study:
    """The study of a file.

    Args:
        path: YAML.
        folder: Where its runs are; None takes what it says, or `studies/<name of the file>`.
        options: Further ones of all runs, as words.

    Raises:
        ValueError: If there is no such file, or it says what a study does not have.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; studies that ship: softprompt configs")
    said = read_yaml(path) or {}
    known = ["folder", "common", "stages", "compare", "repeat", "tests", "metrics"]
    if not isinstance(said, dict) or set(said) - set(known):
        shown = list(said) if isinstance(said, dict) else type(said).__name__
        raise ValueError(f"{path} must be a mapping with some of {known}, got {shown}")
    place = folder or Path(said.pop("folder", Path("studies", path.stem)))
    given: dict[str, Any] = {name: value or {} for name, value in said.items()}
    given |= {noun: combinations(given[noun]) for noun in ("compare", "repeat") if noun in given}
    for noun in ("stages", "tests"):
        if noun in given:
            if not isinstance(given[noun], dict):
                raise ValueError(f"{path}: {noun} must have a name for each, as in {{source: {{}}}}, got {given[noun]}")
            given[noun] = {str(name): own or {} for name, own in given[noun].items()}
    options_of = {"common": given.get("common", {}), **given.get("stages", {}), **given.get("tests", {})}
    if wrong := [name for name, own in options_of.items() if not isinstance(own, dict)]:
        raise ValueError(f"{path}: {', '.join(wrong)} must have values by option, such as {{trainer.max_steps: 200}}")
    given["common"] = {**given.get("common", {}), **as_options(options)}
    return Study(folder=place, **given)


def combinations(given: Any) -> list[Options]:
    """A list of options as it is; of lists of values by option, all combinations.

    Raises:
        ValueError: If it is neither.

    >>> combinations({"data.shots": [8], "seed_everything": [1, 2]})
    [{'data.shots': 8, 'seed_everything': 1}, {'data.shots': 8, 'seed_everything': 2}]
    """
    if isinstance(given, dict) and given and all(isinstance(values, list) and values for values in given.values()):
        if (count := prod(len(values) for values in given.values())) > MAX_COMBINATIONS:
            raise ValueError(
                f"compare and repeat have {count:,} combinations; at most {MAX_COMBINATIONS:,} are possible"
            )
        return [dict(zip(given, values, strict=True)) for values in product(*given.values())]
    if isinstance(given, list) and given and all(isinstance(options, dict) for options in given):
        return given
    raise ValueError(
        f"compare and repeat want values by option, as in {{data.seed: [1, 2]}}, or a list of options, got {given}"
    )


def as_options(given: Sequence[str]) -> dict[str, str]:
    """Words of a command as options.

    Raises:
        ValueError: If a value has no name, or a name no value.

    >>> as_options(["--model", "MPT", "--model.length=5"])
    {'model': 'MPT', 'model.length': '5'}
    """
    options: dict[str, str] = {}
    rest = list(given)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest):
            raise ValueError(f"options of runs are like --model MPT or --model.length=5, got {name!r}")
        options[name.removeprefix("--")] = value if equals else rest.pop(0)
    return options
