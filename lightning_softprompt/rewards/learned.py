"""The score of a trained reward model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.frozen_role import SavedRole
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward


@final
@dataclass(frozen=True)
class Learned(Reward):
    """The score of a prompt that was trained with `RewardModeling`, on the backbone of the run.

    Its soft tokens are at the slots of the template of the run.

    Args:
        path: Its `prompt.safetensors` or checkpoint.
    """

    path: str

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B].

        Raises:
            ValueError: If the file cannot be loaded on this backbone, or its readout does not score answers.
        """
        if "role" not in self._state:
            self._state["role"] = SavedRole.load(Path(self.path).expanduser(), lm.backbone)
        method = self._state["role"].method
        if method.readout is None or not method.readout.scores_answers:
            raise ValueError(f"{self.path} does not score answers; train it with --model.objective RewardModeling")
        return method.lm().scores(batch).float()  # type: ignore[no-any-return]

    @cached_property
    def _state(self) -> dict[str, Any]:
        return {}
