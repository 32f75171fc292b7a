"""What Lightning's checkpoints lack for a run to go on as if it had never stopped."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class RngState(Callback):
    """Keeps the states of Python's, NumPy's and PyTorch's random numbers, of every process, in checkpoints.

    With it, and a `ResumableLoader`, dropout and whatever else is drawn in training continue bit by bit. What
    validation draws leaves no trace in training: it does not matter how often a run is validated, nor that a resumed
    one leaves out the validation which was due right after its checkpoint.
    """

    def __init__(self) -> None:
        self._loaded: list[Mapping[str, Any]] | None = None
        self._training: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes; all of them must call this, as they do when Lightning saves."""
        return {"ranks": gathered(_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts: setting up draws random numbers too. They are tried out at once."""
        before = _states()
        try:
            for states in state_dict["ranks"]:
                _restore({**states, "cuda": None})
        finally:
            _restore(before)
        self._loaded = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore them before the first batch is fetched, which may draw some."""
        ranks, self._loaded = self._loaded, None
        if ranks is None:
            return
        if len(ranks) == trainer.world_size:
            _restore(ranks[trainer.global_rank])
        else:
            rank_zero_warn(
                f"the checkpoint has the random states of {len(ranks)} processes, not {trainer.world_size}: dropout "
                "will differ from the uninterrupted run. Resume on the same number of processes to repeat it"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where training was."""
        self._training = _states()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back there; callbacks that save checkpoints come after this one."""
        if self._training is not None:
            _restore(self._training)


def gathered(own: Any) -> list[Any]:
    """What each process has, in the order of their numbers; all of them must call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return ranks


def _states() -> dict[str, Any]:
    """The states as tensors, lists and numbers, which load with `weights_only=True`."""
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
