"""A study: runs that belong together, each of them done once, however often the study is started."""

from __future__ import annotations

import fcntl
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Literal

from lightning_softprompt.system.atomic_files import write_file

log = logging.getLogger(__name__)
Options = Mapping[str, Any]  # of a run command, without the dashes
Metrics = Mapping[str, float]

STAGE, TEST = "run", "test"  # names where the study gives none
NAME = re.compile(r"\w[\w.-]*")
PLACE = re.compile(r"\$\{([^}]*)\}")
LONGEST = 60  # characters of a value in the name of a folder


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Args:
        folder: Where its runs are.
        common: Options of all runs.
        stages: Runs of `fit` that follow each other, each with options of its own; `${NAME}` in them is the folder of
            an earlier stage.
        compare: What sets lines of the table apart, as options of all runs.
        repeat: The same, but results are averaged over these.
        tests: By name, options of tests that every stage is put to; without any, the last stage is tested on its own
            data.
        metrics: Those that the table shows; none shows the usual ones.

    Raises:
        ValueError: If a name cannot be that of a folder, or a stage asks for one that does not precede it.
    """

    folder: Path
    common: Options = field(default_factory=dict)
    stages: Mapping[str, Options] = field(default_factory=lambda: {STAGE: {}})
    compare: Sequence[Options] = ({},)
    repeat: Sequence[Options] = ({},)
    tests: Mapping[str, Options] = field(default_factory=dict)
    metrics: Sequence[str] = ()

    def __post_init__(self) -> None:
        if wrong := [name for name in (*self.stages, *self.tests) if not NAME.fullmatch(name)]:
            raise ValueError(f"names of stages and tests are of letters, digits, _, - and dots, got {wrong}")
        for number, (name, options) in enumerate(self.stages.items()):
            before = list(self.stages)[:number]
            if unknown := set(PLACE.findall(json.dumps([self.common, options]))) - set(before):
                raise ValueError(f"stage {name!r} asks for {sorted(unknown)}, but the stages before it are {before}")

    @property
    def variants(self) -> list[Options]:
        """What sets runs of a stage apart: each line with each repetition."""
        return [{**line, **again} for line, again in product(self.compare, self.repeat)]

    @property
    def tests_of(self) -> Mapping[str, Mapping[str, Options]]:
        """By stage the tests that it is put to."""
        last = list(self.stages)[-1]
        return {stage: self.tests or ({TEST: {}} if stage == last else {}) for stage in self.stages}

    @property
    def steps(self) -> list[Step]:
        """All runs in their order."""
        return [step for variant in self.variants for step in self._steps(variant)]

    def _steps(self, variant: Options) -> Iterator[Step]:
        place = self.folder / folder_name(variant)
        for stage, options in self.stages.items():
            own = {**self.common, **options}
            yield Step("fit", place, stage, "", tuple(words({**own, **variant})), variant)
            for test, other in self.tests_of[stage].items():
                yield Step("test", place, stage, test, tuple(words({**own, **other, **variant})), variant)


@dataclass(frozen=True)
class Step:
    """One run of a study.

    Args:
        command: What is run.
        place: The folder of its variant.
        stage: The stage that it is, or tests.
        test: The test's name.
        words: Its options as on the command line, but for where it starts and leaves its files.
        variant: What sets it apart.
    """

    command: Literal["fit", "test"]
    place: Path
    stage: str
    test: str
    words: tuple[str, ...]
    variant: Options

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.stage if self.command == "fit" else f"{self.stage}.{self.test}"

    @property
    def folder(self) -> Path:
        """Where it leaves its files."""
        return self.place / self.name

    @property
    def record(self) -> Path:
        """Says what was begun, and what came of it."""
        return self.place / f"{self.name}.json"

    def found(self) -> Metrics | None:
        """The metrics, if it was done before.

        Raises:
            ValueError: If what was begun or done had other options.
        """
        if not self.record.is_file():
            return None
        saved = _read_record(self.record)
        if saved["metrics"] is None and not self._last.is_file():
            return None  # nothing came of it, as where an option was misspelt
        if saved["options"] != self._identity:
            gone, new = (
                sorted(f"{k}={v}" for k, v in one.items() if other.get(k) != v)
                for one, other in ((saved["options"], self._identity), (self._identity, saved["options"]))
            )
            raise ValueError(
                f"{self.folder} was begun with other options: {gone or 'nothing'} then, {new or 'nothing'} now. Delete "
                f"{self.record} to run it anew, or give the study another folder"
            )
        return saved["metrics"]

    def do(self, run: Callable[[Sequence[str]], int]) -> int:
        """Runs it, from where it was killed if it was; gives the exit code."""
        if not self._goes_on:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._write(None)
        if code := run([self.command, *self._start, *self._place]):
            return code
        kept = {"fit": "val", "test": "test"}[self.command]
        self._write(json.loads((self.folder / "metrics.json").read_text()).get(kept, {}))
        return 0

    @property
    def _last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def _goes_on(self) -> bool:
        """Whether the last checkpoint is there and whole: a machine that lost its power may leave half of one."""
        from lightning_softprompt.checkpoints.prompt_file import load_checkpoint

        if self.command != "fit" or not self.record.is_file() or not self._last.is_file():
            return False
        try:
            load_checkpoint(self._last)
        except ValueError as error:
            log.warning("%s begins anew: %s", self.folder, error)
            return False
        return True

    @property
    def _start(self) -> list[str]:
        """Its options, with where it starts: at the stage's prompt, where it was killed, or as the study says."""
        given = [PLACE.sub(lambda found: str(self.place / found[1]), word) for word in self.words]
        if self.command == "fit" and not self._goes_on:
            return given
        kept = [word for word in given if not word.startswith("--init_from=")]
        if self.command == "fit":
            return [*kept, f"--ckpt_path={self._last}"]
        prompt = self.place / self.stage / "prompt.safetensors"  # of several replicas there is none
        best = self.place / self.stage / "checkpoints" / "best.ckpt"
        return [*kept, f"--init_from={prompt}" if prompt.is_file() else f"--ckpt_path={best}"]

    @property
    def _place(self) -> list[str]:
        return [f"--run.folder={self.place.parent}", f"--run.experiment={self.place.name}", f"--run.name={self.name}"]

    @property
    def _identity(self) -> dict[str, str]:
        """What must be the same for it to be the same run: its options, and the configs that they name."""
        values = dict(word.split("=", 1) for word in self.words)
        files = {value for value in values.values() if value.endswith((".yaml", ".yml")) and Path(value).is_file()}
        return {**values, **{f"content of {path}": digest(Path(path).read_bytes()) for path in sorted(files)}}

    def _write(self, metrics: Metrics | None) -> None:
        said = {"options": self._identity, "metrics": metrics}
        write_file(self.record, f"{json.dumps(said, indent=2)}\n".encode())


def _read_record(path: Path) -> dict[str, Any]:
    """What a file says of a run.

    Raises:
        ValueError: If it was damaged, or is something else.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to run it again") from error
    if not isinstance(saved, dict) or not {"options", "metrics"} <= saved.keys():
        raise ValueError(f"{path} is no record of a run of a study; delete it to run it again")
    return saved


def words(options: Options) -> list[str]:
    """Options as words of a command: configs first, and what names a class before the options of that.

    >>> words({"model.length": 5, "model": "MPT", "data.labels": {"a": "b"}})
    ['--model=MPT', '--model.length=5', '--data.labels={"a": "b"}']
    """
    names = sorted(options, key=lambda name: (name != "config", name.count(".")))
    return [f"--{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in ((n, options[n]) for n in names)]


def folder_name(variant: Options) -> str:
    """A name that another value makes another.

    >>> folder_name({"data.shots": 8, "seed_everything": 1}), folder_name({})
    ('data.shots=8,seed_everything=1', 'all')
    """
    return ",".join(f"{name}={_short(value)}" for name, value in variant.items()) or "all"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    plain = re.sub(r"[^\w.+-]+", "_", Path(text).stem if text.endswith(".yaml") else text)
    return text if plain == text and len(text) <= LONGEST else f"{plain[:LONGEST]}-{digest(text.encode())}"


def digest(content: bytes) -> str:
    """A short hash."""
    return sha256(content).hexdigest()[:8]


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Within it no other process runs the study of a folder.

    Raises:
        ValueError: If one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process runs the study in {folder}; wait for its end") from None
        yield
