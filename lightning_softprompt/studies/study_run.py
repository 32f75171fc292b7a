"""A training, test or prediction of a study, and how it resumes."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from lightning_softprompt.studies.options import Options, describe_options, with_defaults
from lightning_softprompt.studies.stage_run import RunCommand, StageRun

log = logging.getLogger(__name__)
DEFAULT_STAGE, DEFAULT_TEST = "run", "test"
RUN_COMMANDS = ("fit", "predict")  # of stages


@dataclass(frozen=True)
class StudyRun(StageRun):
    """A training, test or prediction of a study."""

    def run(self, run_command: RunCommand) -> int:
        """Starts or resumes the run.

        Args:
            run_command: Runs a command with its arguments and returns the exit code.

        Returns:
            The exit code.
        """
        can_resume = self._can_resume()
        if not can_resume and self.command != "predict":  # predictions continue an incomplete file
            shutil.rmtree(self.folder, ignore_errors=True)
        self.write_record(None)
        arguments = with_defaults(self._start_arguments(can_resume), self._wandb_options)
        code = run_command([self.command, *arguments, *self._folder_arguments])
        if code:
            return code
        self.write_record({} if self.command == "predict" else self._read_report())
        return 0

    def _read_report(self) -> dict[str, float]:
        """Returns the metrics of the last validation or of the test."""
        report = json.loads((self.folder / "metrics.json").read_text())
        values: dict[str, float] = report.get("val" if self.command == "fit" else "test", {})
        return values

    @property
    def can_continue(self) -> bool:
        """Whether there is a checkpoint."""
        return self._last_checkpoint.is_file()

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
        arguments = self.arguments_with_folders()
        if self.command == "predict" or (self.command == "fit" and not can_resume):
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
