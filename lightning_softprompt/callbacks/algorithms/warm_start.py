"""Starts a run from a trained prompt."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lightning_softprompt.checkpoints.class_names import check_class_names
from lightning_softprompt.checkpoints.prompt_file import REPLICAS, read_prompt
from lightning_softprompt.methods.base import SoftPromptModule

log = logging.getLogger(__name__)


class WarmStart(Callback):
    """Loads a saved prompt into the module before the first step. Step, optimizer and schedule start fresh.

    Args:
        path: A `prompt.safetensors` or a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, trainer: Trainer, pl_module: SoftPromptModule) -> None:  # type: ignore[override]
        """Load the prompt before training."""
        self._load(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: SoftPromptModule) -> None:  # type: ignore[override]
        """Load the prompt before `validate`, but not before the validations of a training."""
        if not trainer.training and trainer.state.fn == "validate":
            self._load(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: SoftPromptModule) -> None:  # type: ignore[override]
        """Load the prompt before `test`."""
        self._load(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: SoftPromptModule) -> None:  # type: ignore[override]
        """Load the prompt before `predict`."""
        self._load(pl_module)

    def _load(self, module: SoftPromptModule) -> None:
        saved = read_prompt(self.path)
        saved.check(module.loaded, self.path)
        check_class_names(saved.method, saved.tensors, module.hparams, self.path)
        try:
            module.load_state_dict(saved.tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            if (count := module.hparams.get(REPLICAS, 1)) > 1:
                reason = f"it is not of {count} replicas; --replicas=1 takes a single prompt"
            raise ValueError(f"{self.path} does not fit {type(module).__name__}: {reason}") from None
        log.info("Starting from the prompt of %s", self.path)
