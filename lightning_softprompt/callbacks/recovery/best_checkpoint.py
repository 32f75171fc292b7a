"""The checkpoint of the best validation, also of a run that is resumed in another folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from lightning_softprompt.checkpoints.prompt_file import load_checkpoint
from lightning_softprompt.system.atomic_files import write_file

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Saves whenever the monitored metric is better than before.

    Lightning keeps absolute paths, and forgets the best score where the folder is another. Here a run that was moved or
    copied finds its best checkpoint beside the one that it is resumed from, and a new folder gets a copy of it.

    Args:
        folder: Where it is saved.
        name: The name of the file, without its ending.
        monitor: The metric.
        mode: Whether its least or its greatest value is best.
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
        """The key of Lightning's own class, by which checkpoints of earlier versions have it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best score, and the checkpoint of it."""
        score = state_dict["best_model_score"]
        if score is None:
            return
        found = self._find(state_dict)
        if found is None:
            log.warning(
                "the best checkpoint so far, with %s = %.4g, is not at %s nor beside the checkpoint that is resumed; "
                "the best is chosen from here on", self.monitor, score, state_dict["best_model_path"],
            )  # fmt: skip
            return
        self._source = None if _is_same(found, self.file) else found
        path = str(self.file)
        here = {"best_model_path": path, "kth_best_model_path": path, "best_k_models": {path: score}}
        super().load_state_dict({**state_dict, **here, "dirpath": self.dirpath, "last_model_path": ""})

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
        """The checkpoint of the best score: the own one, one beside the resumed checkpoint, or where it was saved."""
        beside = [] if self.resumed is None else [self.resumed.absolute().parent / self.file.name]
        if self.file.is_file() and (not beside or _is_same(beside[0], self.file)):
            return self.file  # also where a killed run saved a better one after the checkpoint that is resumed
        places = [*beside, Path(state["best_model_path"])]
        return next((path for path in places if self._holds(path, float(state["best_model_score"]))), None)

    def _holds(self, path: Path, score: float) -> bool:
        """Whether a checkpoint is of the validation with a score."""
        try:
            state = load_checkpoint(path)["callbacks"][self.state_key]
        except (ValueError, KeyError, OSError):
            return False
        return state["best_model_score"] is not None and float(state["best_model_score"]) == score


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    log.info("%s is copied to %s", source, target)
    write_file(target, source.read_bytes())
