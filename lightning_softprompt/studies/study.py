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

from lightning_softprompt.studies.folder_stage import FOLDER_COMMANDS, FolderStage
from lightning_softprompt.studies.options import Options, to_arguments, to_text
from lightning_softprompt.studies.row_stage import ROW_COMMANDS, RowStage
from lightning_softprompt.studies.stage_run import STAGE_REFERENCE, StageRun, short_hash
from lightning_softprompt.studies.study_run import DEFAULT_STAGE, DEFAULT_TEST, RUN_COMMANDS, StudyRun
from lightning_softprompt.system.file_locks import lock_file

NAME = re.compile(r"\w[\w.-]*")
LONGEST_VALUE = 60  # characters of a value in the name of a folder
COMMAND = "command"  # the option of a stage that names its command
OF_STAGE = "/"  # between the name of a stage and an option of this stage alone
TESTED_STAGES = "stages"  # the option of a test that names the stages to test
BACKBONE = "backbone"
STAGE_CLASSES: Mapping[str, type[StageRun]] = {
    **dict.fromkeys(RUN_COMMANDS, StudyRun),
    **dict.fromkeys(ROW_COMMANDS, RowStage),
    **dict.fromkeys(FOLDER_COMMANDS, FolderStage),
}


@dataclass(frozen=True)
class Study:
    """The contents of a study file.

    Args:
        folder: Folder of its runs.
        common: Options of all runs.
        stages: Options of consecutive stages by name; `${NAME}` in an option is the folder of an earlier stage. The
            option `command` of a stage is its command: `fit` (default), `predict`, `write`, `filter`, `vocabulary` or
            `merge`.
        compare: Options of all runs, one set for each row of the table.
        repeat: Options of all runs, one set for each repetition. Results are averaged over repetitions.
        tests: Options by test; each trained stage is tested with each of them, or the stages in the option `stages` of
            a test. Without tests, the last stage is tested on its own data.
        metrics: Metrics of the table; the usual ones if empty.

    Raises:
        ValueError: If a name is not valid for a folder, a command is unknown, a stage refers to a stage that does not
            precede it, or a test names a stage that is not trained.
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
        for name in self.stages:
            command = self.command_of(name)
            if command not in STAGE_CLASSES:
                raise ValueError(f"stage {name!r} has the command {command!r}; known are {list(STAGE_CLASSES)}")
            references = self._references(name, *self.compare, *self.repeat)
            if unknown := sorted(set(references) - set(earlier)):
                raise ValueError(f"stage {name!r} refers to {unknown}, but the stages before it are {earlier}")
            earlier.append(name)
        self._check_stage_options()
        self._check_tested_stages()

    def _check_tested_stages(self) -> None:
        for name, options in self.tests.items():
            stages = options.get(TESTED_STAGES, [])
            if not isinstance(stages, list) or not set(stages) <= set(self._trained_stages):
                raise ValueError(
                    f"stages of the test {name!r} must be a list of trained stages, which are "
                    f"{self._trained_stages}, got {stages}"
                )

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
        """Returns the command of a stage, such as `fit`."""
        return str(self.stages[stage].get(COMMAND, "fit"))

    @property
    def _trained_stages(self) -> list[str]:
        return [stage for stage in self.stages if self.command_of(stage) == "fit"]

    def _options_of_stage(self, stage: str, options: Options) -> dict[str, Any]:
        """Returns those of some options that apply to a stage, without the name of the stage before them."""
        return {name.removeprefix(f"{stage}{OF_STAGE}"): options[name] for name in self._applicable(stage, options)}

    def _applicable(self, stage: str, options: Options) -> list[str]:
        """Returns the names of those of some options that apply to a stage.

        Options of runs do not apply to stages with other commands, except the backbone that writes rows.
        """
        command = self.command_of(stage)
        names = []
        for name in options:
            of_stage, separator, _ = name.partition(OF_STAGE)
            is_backbone = name.partition(".")[0] == BACKBONE and command == "write"
            applies_to_all = not separator and (is_backbone or command in RUN_COMMANDS)
            if applies_to_all or (separator and of_stage == stage):
                names.append(name)
        return names

    @property
    def variants(self) -> list[Options]:
        """Options of each repetition of each row of the table."""
        return [{**row, **repetition} for row, repetition in product(self.compare, self.repeat)]

    @property
    def tests_by_stage(self) -> Mapping[str, Mapping[str, Options]]:
        """Options of the tests of each stage."""
        trained = self._trained_stages
        by_stage: dict[str, dict[str, Options]] = {stage: {} for stage in self.stages}
        for name, options in self.tests.items():
            run_options = {option: value for option, value in options.items() if option != TESTED_STAGES}
            for stage in options.get(TESTED_STAGES, trained):
                by_stage[stage][name] = run_options
        if not self.tests and trained:
            by_stage[trained[-1]][DEFAULT_TEST] = {}
        return by_stage

    @property
    def runs(self) -> list[StageRun]:
        """All runs in their order. A stage whose options are equal in several variants runs once."""
        by_folder: dict[Path, StageRun] = {}
        for variant in self.variants:
            for run in self._runs_of_variant(variant):
                by_folder.setdefault(run.folder, run)
        return list(by_folder.values())

    def _runs_of_variant(self, variant: Options) -> Iterator[StageRun]:
        folders: dict[str, Path] = {}
        relevant: dict[str, Options] = {}  # options of the variant that a stage depends on
        for stage in self.stages:
            options = self._shared_options(stage)
            of_variant = self._options_of_stage(stage, variant)
            arguments = tuple(to_arguments({**options, **of_variant}))
            relevant[stage] = self._relevant_options(stage, variant, relevant)
            folder = self.folder / folder_name(relevant[stage])
            folders[stage] = folder / stage
            command = self.command_of(stage)
            stage_class = STAGE_CLASSES[command]
            yield stage_class(command, folder, stage, "", arguments, relevant[stage], dict(folders))
            for test, test_options in self.tests_by_stage[stage].items():
                arguments = tuple(to_arguments({**options, **test_options, **of_variant}))
                yield StudyRun("test", folder, stage, test, arguments, relevant[stage], dict(folders))

    def _relevant_options(self, stage: str, variant: Options, earlier: Mapping[str, Options]) -> Options:
        """Returns the options of a variant that a stage depends on, also through the stages to which it refers."""
        needed = set(self._applicable(stage, variant))
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
