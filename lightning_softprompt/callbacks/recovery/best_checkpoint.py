"""The checkpoint of the best validation, also if a run is resumed in another folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.system.atomic_files import write_file

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Saves a checkpoint whenever the monitored metric improves.

    Lightning stores absolute paths, and drops the best score if the folder differs. This class finds the best
    checkpoint of a moved or copied run next to the checkpoint that is resumed, and copies it to a new folder.

    Args:
        folder: The folder of the checkpoint.
        name: The file name, without suffix.
        monitor: The metric.
        mode: Whether the minimum or the maximum is best.
        resumed: The checkpoint that the run is resumed from, if any.
    """

    def __init__(
        self, folder: Path, name: str, monitor: str, mode: Literal["min", "max"], resumed: Path | None = None
    ) -> None:
        super().__init__(
            folder, name, monitor=monitor, mode=mode, save_on_train_epoch_end=False, enable_version_counter=False
        )
        self.file = Path(folder).absolute() / f"{name}.ckpt"
        self.resumed = resumed
        self._source: Path | None = None  # the best checkpoint of the resumed run, which the folder does not have yet

    @property
    def state_key(self) -> str:
        """The key of Lightning's class, as in checkpoints of earlier versions."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and its checkpoint."""
        score = state_dict["best_model_score"]
        if score is None:
            return
        checkpoint = self._find(state_dict)
        if checkpoint is None:
            log.warning(
                "The best checkpoint so far (%s = %.4g) was not found at %s or next to the resumed checkpoint; only "
                "later validations are considered", self.monitor, score, state_dict["best_model_path"],
            )  # fmt: skip
            return
        self._source = None if _is_same(checkpoint, self.file) else checkpoint
        path = str(self.file)
        paths = {"best_model_path": path, "kth_best_model_path": path, "best_k_models": {path: score}}
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "last_model_path": ""})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run folder exists by now: copy the best checkpoint."""
        super().on_train_start(trainer, pl_module)
        self._copy_source()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the best checkpoint for a run without a step."""
        self._copy_source()

    def _copy_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            _copy(source, self.file)

    def _find(self, state: Mapping[str, Any]) -> Path | None:
        """Find the checkpoint of the best score: here, next to the resumed checkpoint, or where it was saved."""
        neighbors = [] if self.resumed is None else [self.resumed.absolute().parent / self.file.name]
        if self.file.is_file() and (not neighbors or _is_same(neighbors[0], self.file)):
            return self.file  # also if a killed run saved a better one after the resumed checkpoint
        candidates = [*neighbors, Path(state["best_model_path"])]
        return next((path for path in candidates if self._has_score(path, float(state["best_model_score"]))), None)

    def _has_score(self, path: Path, score: float) -> bool:
        """Whether a checkpoint belongs to the validation with a score."""
        try:
            state = load_checkpoint(path)["callbacks"][self.state_key]
        except (ValueError, KeyError, OSError):
            return False
        return state["best_model_score"] is not None and float(state["best_model_score"]) == score


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    log.info("Copying %s to %s", source, target)
    write_file(target, source.read_bytes())
