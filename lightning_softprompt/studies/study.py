"""A study: a grid of trainings and tests, each of which runs once, however often the study is started."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from lightning_softprompt.studies.options import Options, to_arguments, to_text
from lightning_softprompt.studies.study_run import DEFAULT_STAGE, DEFAULT_TEST, STAGE_REFERENCE, StudyRun, short_hash
from lightning_softprompt.system.file_locks import lock_file

NAME = re.compile(r"\w[\w.-]*")
LONGEST_VALUE = 60  # characters of a value in the name of a folder


@dataclass(frozen=True)
class Study:
    """The contents of a study file.

    Args:
        folder: Folder of its runs.
        common: Options of all runs.
        stages: Options of consecutive trainings by stage; `${NAME}` in an option is the folder of an earlier stage.
        compare: Options of all runs, one set for each row of the table.
        repeat: Options of all runs, one set for each repetition. Results are averaged over repetitions.
        tests: Options by test; each stage is tested with each of them. Without tests, the last stage is tested on its
            own data.
        metrics: Metrics of the table; the usual ones if empty.

    Raises:
        ValueError: If a name is not valid for a folder, or a stage refers to a stage that does not precede it.
    """

    folder: Path
    common: Options = field(default_factory=dict)
    stages: Mapping[str, Options] = field(default_factory=lambda: {DEFAULT_STAGE: {}})
    compare: Sequence[Options] = ({},)
    repeat: Sequence[Options] = ({},)
    tests: Mapping[str, Options] = field(default_factory=dict)
    metrics: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = [*self.stages, *self.tests]
        if invalid := [name for name in names if not NAME.fullmatch(name)]:
            raise ValueError(
                f"names of stages and tests must consist of letters, digits, _, - and dots, got {', '.join(invalid)}"
            )
        earlier: list[str] = []
        for name, options in self.stages.items():
            references = STAGE_REFERENCE.findall(json.dumps([self.common, options]))
            if unknown := sorted(set(references) - set(earlier)):
                raise ValueError(f"stage {name!r} refers to {unknown}, but the stages before it are {earlier}")
            earlier.append(name)

    @property
    def variants(self) -> list[Options]:
        """Options of each repetition of each row of the table."""
        return [{**row, **repetition} for row, repetition in product(self.compare, self.repeat)]

    @property
    def tests_by_stage(self) -> Mapping[str, Mapping[str, Options]]:
        """Options of the tests of each stage."""
        if self.tests:
            return dict.fromkeys(self.stages, self.tests)
        last = list(self.stages)[-1]
        return {stage: {DEFAULT_TEST: {}} if stage == last else {} for stage in self.stages}

    @property
    def runs(self) -> list[StudyRun]:
        """All runs in their order."""
        return [run for variant in self.variants for run in self._runs_of_variant(variant)]

    def _runs_of_variant(self, variant: Options) -> Iterator[StudyRun]:
        folder = self.folder / folder_name(variant)
        for stage, stage_options in self.stages.items():
            options = {**self.common, **stage_options}
            arguments = tuple(to_arguments({**options, **variant}))
            yield StudyRun("fit", folder, stage, "", arguments, variant)
            for test, test_options in self.tests_by_stage[stage].items():
                arguments = tuple(to_arguments({**options, **test_options, **variant}))
                yield StudyRun("test", folder, stage, test, arguments, variant)


def folder_name(variant: Options) -> str:
    """Returns the name of a variant's folder, which is different for each variant.

    >>> folder_name({"data.shots": 8, "seed_everything": 1}), folder_name({})
    ('data.shots=8,seed_everything=1', 'all')
    """
    return ",".join(f"{name}={_shorten(value)}" for name, value in variant.items()) or "all"


def _shorten(value: Any) -> str:
    """Returns a value as part of a file name: unchanged if possible, otherwise abbreviated with a hash."""
    text = to_text(value)
    stem = Path(text).stem if text.endswith(".yaml") else text
    plain = re.sub(r"[^\w.+-]+", "_", stem)
    if plain == text and len(text) <= LONGEST_VALUE:
        return text
    return f"{plain[:LONGEST_VALUE]}-{short_hash(text.encode())}"


@contextmanager
def lock_study(folder: Path) -> Iterator[None]:
    """Context in which no other process runs the study of a folder.

    Raises:
        ValueError: If another process runs it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            lock_file(file, folder)
        except BlockingIOError:
            raise ValueError(f"another process runs the study in {folder}; wait until it ends") from None
        yield
