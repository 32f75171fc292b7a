"""`RunOutputs`: the files that a training from Python leaves in its run folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_softprompt.callbacks.recovery.best_checkpoint import BestCheckpoint
from lightning_softprompt.callbacks.recovery.final_checkpoint import FinalCheckpoint
from lightning_softprompt.callbacks.recovery.final_validation import FinalValidation
from lightning_softprompt.callbacks.recovery.patience import Patience
from lightning_softprompt.callbacks.recovery.resume import RngState
from lightning_softprompt.callbacks.recovery.run_settings import RunSettings
from lightning_softprompt.callbacks.reporting.parameter_summary import ParameterSummary
from lightning_softprompt.callbacks.reporting.run_files import RunFiles
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.runs.run_settings import CommandSettings
from lightning_softprompt.runs.run_spec import RunSpec, make_folder
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.training.monitors import choose_monitor
from lightning_softprompt.training.prompt_files import count_validation_rows, write_prompt_files
from lightning_softprompt.training.python_config import PythonConfig


class RunOutputs:
    """The run folder of one training from Python.

    Args:
        run: Options of the run folder.
        data: The data module, whose evaluation selects the best validation.
        config: The config of the run.
        patience: Number of validations without improvement that end the training; 0 for no such limit.
        is_first: Whether this is the first process, which writes the config.
    """

    def __init__(
        self, run: RunSpec, data: SoftPromptDataModule, config: PythonConfig, patience: int, is_first: bool
    ) -> None:
        self.data = data
        self.folder = run.name_folder(training=True)
        self.config_file = self.folder / "config.yaml"
        make_folder(self.folder, "fit", not_in_config=config.left_out)
        if is_first:
            write_file(self.config_file, config.text.encode())
        monitor, mode = choose_monitor(run, data.evaluation)
        self.last = self.folder / "checkpoints" / "last.ckpt"
        self.best = BestCheckpoint(self.last.parent, "best", monitor, mode)
        self.callbacks: list[Callback] = [
            FinalValidation(), ParameterSummary(rank_zero_info), RunFiles(self.folder, monitor, mode), self.best,
            FinalCheckpoint(self.last, run.keep_last), RngState(),
            RunSettings(CommandSettings(config.complete_values, data, "fit", (monitor, mode), config.left_out)),
        ]  # fmt: skip
        if patience:
            self.callbacks.append(Patience(monitor, mode, patience))

    @property
    def checkpoints(self) -> dict[str, Path]:
        """The last and the best checkpoint; the last one is the best if there was no validation."""
        return {"best": Path(self.best.best_model_path or self.last), "last": self.last}

    def write_prompt(self, val_limit: int | float | None) -> Path | None:
        """Writes the prompt of the best validation, or of the last step if there was none.

        Args:
            val_limit: The Trainer's `limit_val_batches`.

        Returns:
            The file; None if no step was taken.
        """
        checkpoint = self.checkpoints["best"]
        if not checkpoint.is_file():
            return None
        path = self.folder / "prompt.safetensors"
        rows = count_validation_rows(self.data, val_limit)
        write_prompt_files(read_prompt(checkpoint), path, self.config_file, rows)
        kind = "best" if self.best.best_model_path else "last"
        rank_zero_info(f"the {kind} prompt: {shorten_path(path)}")
        return path


def shorten_path(path: Path) -> Path:
    """Returns the path below the current folder, if it is there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
