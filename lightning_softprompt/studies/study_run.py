"""One run of a study: which options it has, whether it is complete, and how it resumes."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from lightning_softprompt.studies.options import Options, describe_options, with_defaults
from lightning_softprompt.system.atomic_files import write_file

log = logging.getLogger(__name__)
Metrics = Mapping[str, float]
DEFAULT_STAGE, DEFAULT_TEST = "run", "test"
STAGE_REFERENCE = re.compile(r"\$\{([^}]*)\}")  # `${NAME}`, the folder of a stage


@dataclass(frozen=True)
class StudyRun:
    """A training or test of a study.

    A record next to its folder contains its options, and its metrics once it is complete.

    Args:
        command: The command of the run.
        variant_folder: Folder of the variant, which contains the folders of its runs.
        stage: The stage that the run trains or tests.
        test: Name of the test; empty for a training.
        arguments: Options as on the command line, without those for its start and its folder.
        variant: Options that distinguish the variant from the others.
    """

    command: Literal["fit", "test"]
    variant_folder: Path
    stage: str
    test: str
    arguments: tuple[str, ...]
    variant: Options

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.stage if self.command == "fit" else f"{self.stage}.{self.test}"

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.variant_folder / self.name

    @property
    def record(self) -> Path:
        """File with its options and, once it is complete, its metrics."""
        return self.variant_folder / f"{self.name}.json"

    def read_metrics(self) -> Metrics | None:
        """Returns the metrics of a complete run; None if it is not complete.

        Raises:
            ValueError: If the run was started with other options.
        """
        if not self.record.is_file():
            return None
        saved = _read_record(self.record)
        if saved["metrics"] is None and not self._last_checkpoint.is_file():
            return None  # it failed before its first checkpoint, for example because an option was misspelled
        if saved["options"] != self._identity:
            before = _differing_options(saved["options"], self._identity)
            now = _differing_options(self._identity, saved["options"])
            raise ValueError(
                f"{self.folder} was started with other options: {before or 'nothing'} then, {now or 'nothing'} now. "
                f"Delete {self.record} to run it again, or choose another folder for the study"
            )
        return saved["metrics"]

    def run(self, run_command: Callable[[Sequence[str]], int]) -> int:
        """Runs or resumes the training or test.

        Args:
            run_command: Runs a command with its arguments and returns the exit code.

        Returns:
            The exit code.
        """
        can_resume = self._can_resume()
        if not can_resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._write_record(None)
        arguments = with_defaults(self._start_arguments(can_resume), self._wandb_options)
        code = run_command([self.command, *arguments, *self._folder_arguments])
        if code:
            return code
        report = json.loads((self.folder / "metrics.json").read_text())
        stage = "val" if self.command == "fit" else "test"
        self._write_record(report.get(stage, {}))
        return 0

    @property
    def _last_checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def _can_resume(self) -> bool:
        """Returns whether there is an intact last checkpoint; after a power failure it may be incomplete."""
        from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint

        if self.command != "fit" or not self.record.is_file() or not self._last_checkpoint.is_file():
            return False
        try:
            load_checkpoint(self._last_checkpoint)
        except ValueError as error:
            log.warning("%s starts from the beginning: %s", self.folder, error)
            return False
        return True

    def _start_arguments(self, can_resume: bool) -> list[str]:
        """Returns the options, including where the run starts.

        A test loads the prompt of its stage. A training resumes from its last checkpoint, or starts as the study file
        specifies.
        """
        arguments = [self._replace_references(argument) for argument in self.arguments]
        if self.command == "fit" and not can_resume:
            return arguments
        arguments = [argument for argument in arguments if not argument.startswith("--init_from=")]
        if self.command == "fit":
            return [*arguments, f"--ckpt_path={self._last_checkpoint}"]
        stage_folder = self.variant_folder / self.stage
        prompt = stage_folder / "prompt.safetensors"
        if prompt.is_file():
            return [*arguments, f"--init_from={prompt}"]
        # a run with several replicas writes no single prompt
        return [*arguments, f"--ckpt_path={stage_folder / 'checkpoints' / 'best.ckpt'}"]

    def _replace_references(self, argument: str) -> str:
        return STAGE_REFERENCE.sub(lambda match: str(self.variant_folder / match[1]), argument)

    @property
    def _folder_arguments(self) -> list[str]:
        return [
            f"--run.folder={self.variant_folder.parent}",
            f"--run.experiment={self.variant_folder.name}",
            f"--run.name={self.name}",
        ]

    @property
    def _wandb_options(self) -> Options:
        """How the run is shown on W&B: named by what varies, in the group of the study.

        The default test continues the W&B run of its training. Each of several tests is a run of its own, because their
        metrics have the same names.
        """
        group = {"run.group": self.variant_folder.parent.resolve().name}
        if self.command == "test" and self.test == DEFAULT_TEST:
            return group
        stage = [] if self.name == DEFAULT_STAGE else [self.name]
        name = " ".join([*stage, describe_options(self.variant)]).strip() or self.name
        job_type = self.command if self.command == "test" or self.stage == DEFAULT_STAGE else self.stage
        return {"run.display_name": name, "run.job_type": job_type, **group}

    @property
    def _identity(self) -> dict[str, str]:
        """What must be equal in the record of the same run: its options and the contents of their config files."""
        options = dict(argument.split("=", 1) for argument in self.arguments)
        contents = {}
        for value in sorted(set(options.values())):
            if value.endswith((".yaml", ".yml")) and Path(value).is_file():
                contents[f"content of {value}"] = short_hash(Path(value).read_bytes())
        return {**options, **contents}

    def _write_record(self, metrics: Metrics | None) -> None:
        content = {"options": self._identity, "metrics": metrics}
        write_file(self.record, f"{json.dumps(content, indent=2)}\n".encode())


def _differing_options(options: Mapping[str, str], others: Mapping[str, str]) -> list[str]:
    return sorted(f"{name}={value}" for name, value in options.items() if others.get(name) != value)


def _read_record(path: Path) -> dict[str, Any]:
    """Reads the record of a run.

    Raises:
        ValueError: If the file is damaged or not a record.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to run it again") from error
    if not isinstance(saved, dict) or not {"options", "metrics"} <= saved.keys():
        raise ValueError(f"{path} is not the record of a run of a study; delete it to run it again")
    return saved


def short_hash(content: bytes) -> str:
    """Returns a short hash of a content."""
    return sha256(content).hexdigest()[:8]
