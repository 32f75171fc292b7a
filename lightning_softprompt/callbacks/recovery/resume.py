"""State that Lightning's checkpoints lack for an exact resume."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_softprompt.distributed.collectives import gather_objects


class RngState(Callback):
    """Saves the states of the random number generators of Python, NumPy and PyTorch, of every process, in checkpoints.

    Together with a `ResumableLoader`, it makes dropout and other random choices of training continue bit for bit.
    Validation does not advance the generators: neither the number of validations nor the one that a resumed run omits
    right after its checkpoint changes training.
    """

    def __init__(self) -> None:
        self._loaded: list[Mapping[str, Any]] | None = None
        self._training: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes. A collective operation: every process must call it, as on saving."""
        return {"ranks": gather_objects(_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check the states and keep them until training starts, because setup also draws random numbers."""
        before = _states()
        try:
            for states in state_dict["ranks"]:
                _restore({**states, "cuda": None})
        finally:
            _restore(before)
        self._loaded = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states before the first batch is loaded, which may draw random numbers."""
        ranks, self._loaded = self._loaded, None
        if ranks is None:
            return
        if len(ranks) == trainer.world_size:
            _restore(ranks[trainer.global_rank])
        else:
            rank_zero_warn(
                f"The checkpoint has the random states of {len(ranks)} processes, not {trainer.world_size}: dropout "
                "will differ from the uninterrupted run. Resume on the same number of processes for an exact resume"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the states of training."""
        self._training = _states()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states of training; callbacks that save checkpoints run after this one."""
        if self._training is not None:
            _restore(self._training)


def _states() -> dict[str, Any]:
    """The states as tensors, lists and numbers, which can be loaded with `weights_only=True`."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
