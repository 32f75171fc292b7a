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
from lightning_softprompt.studies.row_stage import ROW_COMMANDS, RowStage
from lightning_softprompt.studies.stage_run import STAGE_REFERENCE, StageRun, short_hash
from lightning_softprompt.studies.study_run import DEFAULT_STAGE, DEFAULT_TEST, RUN_COMMANDS, StudyRun
from lightning_softprompt.system.file_locks import lock_file

NAME = re.compile(r"\w[\w.-]*")
LONGEST_VALUE = 60  # characters of a value in the name of a folder
COMMAND = "command"  # the option of a stage that names its command
OF_STAGE = "/"  # between the name of a stage and an option of this stage alone
BACKBONE = "backbone"


@dataclass(frozen=True)
class Study:
    """The contents of a study file.

    Args:
        folder: Folder of its runs.
        common: Options of all runs.
        stages: Options of consecutive stages by name; `${NAME}` in an option is the folder of an earlier stage. The
            option `command` of a stage is its command: `fit` (default), `predict`, `write` or `filter`.
        compare: Options of all runs, one set for each row of the table.
        repeat: Options of all runs, one set for each repetition. Results are averaged over repetitions.
        tests: Options by test; each stage is tested with each of them. Without tests, the last stage is tested on its
            own data.
        metrics: Metrics of the table; the usual ones if empty.

    Raises:
        ValueError: If a name is not valid for a folder, a command is unknown, or a stage refers to a stage that does
            not precede it.
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
        known_commands = [*RUN_COMMANDS, *ROW_COMMANDS]
        earlier: list[str] = []
        for name in self.stages:
            command = self.command_of(name)
            if command not in known_commands:
                raise ValueError(f"stage {name!r} has the command {command!r}; known are {known_commands}")
            references = self._references(name, *self.compare, *self.repeat)
            if unknown := sorted(set(references) - set(earlier)):
                raise ValueError(f"stage {name!r} refers to {unknown}, but the stages before it are {earlier}")
            earlier.append(name)
        self._check_stage_options()

    def _check_stage_options(self) -> None:
        for variant in self.variants:
            stages = [name.partition(OF_STAGE)[0] for name in variant if OF_STAGE in name]
            if unknown := sorted(set(stages) - set(self.stages)):
                raise ValueError(f"compare or repeat has options of {unknown}, but the stages are {list(self.stages)}")

    def _references(self, stage: str, *variants: Options) -> list[str]:
        """Returns the stages to which the options of a stage refer, in the study and in some variants."""
        options = [self._shared_options(stage), *(self._options_of_stage(stage, variant) for variant in variants)]
        return STAGE_REFERENCE.findall(json.dumps(options))

    def _shared_options(self, stage: str) -> dict[str, Any]:
        """Returns the options of a stage that all variants share."""
        options = {name: value for name, value in self.stages[stage].items() if name != COMMAND}
        return {**self._options_of_stage(stage, self.common), **options}

    def command_of(self, stage: str) -> str:
        """Returns the command of a stage: `fit`, `predict`, `write` or `filter`."""
        return str(self.stages[stage].get(COMMAND, "fit"))

    def _writes_rows(self, stage: str) -> bool:
        return self.command_of(stage) in ROW_COMMANDS

    def _options_of_stage(self, stage: str, options: Options) -> dict[str, Any]:
        """Returns those of some options that apply to a stage, without the name of the stage before them.

        Options of runs do not apply to stages that write or filter rows, except the backbone that writes.
        """
        selected: dict[str, Any] = {}
        for name, value in options.items():
            of_stage, separator, option = name.partition(OF_STAGE)
            is_backbone = name.partition(".")[0] == BACKBONE and self.command_of(stage) == "write"
            if separator and of_stage == stage:
                selected[option] = value
            elif not separator and (is_backbone or not self._writes_rows(stage)):
                selected[name] = value
        return selected

    @property
    def variants(self) -> list[Options]:
        """Options of each repetition of each row of the table."""
        return [{**row, **repetition} for row, repetition in product(self.compare, self.repeat)]

    @property
    def tests_by_stage(self) -> Mapping[str, Mapping[str, Options]]:
        """Options of the tests of each stage."""
        trainings = [stage for stage in self.stages if self.command_of(stage) == "fit"]
        if self.tests:
            return {stage: self.tests if stage in trainings else {} for stage in self.stages}
        return {stage: {DEFAULT_TEST: {}} if stage in trainings[-1:] else {} for stage in self.stages}

    @property
    def runs(self) -> list[StageRun]:
        """All runs in their order. Stages that write or filter the same rows for several variants run once."""
        by_folder: dict[Path, StageRun] = {}
        for variant in self.variants:
            for run in self._runs_of_variant(variant):
                by_folder.setdefault(run.folder, run)
        return list(by_folder.values())

    def _runs_of_variant(self, variant: Options) -> Iterator[StageRun]:
        folder = self.folder / folder_name(variant)
        folders: dict[str, Path] = {}  # of stages that may be shared with other variants
        relevant: dict[str, Options] = {}  # options of the variant that a stage depends on
        for stage in self.stages:
            options = self._shared_options(stage)
            of_variant = self._options_of_stage(stage, variant)
            arguments = tuple(to_arguments({**options, **of_variant}))
            relevant[stage] = self._relevant_options(stage, variant, relevant)
            if self._writes_rows(stage):
                shared = self.folder / folder_name(relevant[stage])
                folders[stage] = shared / stage
                yield RowStage(self.command_of(stage), shared, stage, "", arguments, relevant[stage], dict(folders))
                continue
            yield StudyRun(self.command_of(stage), folder, stage, "", arguments, variant, dict(folders))
            for test, test_options in self.tests_by_stage[stage].items():
                arguments = tuple(to_arguments({**options, **test_options, **of_variant}))
                yield StudyRun("test", folder, stage, test, arguments, variant, dict(folders))

    def _relevant_options(self, stage: str, variant: Options, earlier: Mapping[str, Options]) -> Options:
        """Returns the options of a variant that a stage depends on, also through the stages to which it refers."""
        if not self._writes_rows(stage):
            return variant
        needed = set()
        for name in variant:
            of_stage, separator, _ = name.partition(OF_STAGE)
            is_backbone = name.partition(".")[0] == BACKBONE and self.command_of(stage) == "write"
            if of_stage == stage or (is_backbone and not separator):
                needed.add(name)
        for reference in self._references(stage, variant):
            needed |= set(earlier[reference])
        return {name: value for name, value in variant.items() if name in needed}


def folder_name(variant: Options) -> str:
    """Returns the name of a variant's folder, which is different for each variant.

    >>> folder_name({"data.shots": 8, "seed_everything": 1}), folder_name({})
    ('data.shots=8,seed_everything=1', 'all')
    """
    parts = [f"{name.replace(OF_STAGE, '.')}={_shorten(value)}" for name, value in variant.items()]
    return ",".join(parts) or "all"


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
