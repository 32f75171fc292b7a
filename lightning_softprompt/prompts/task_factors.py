"""Where the factors of tasks start, which change a prompt that the tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt

Factors = tuple[Tensor, Tensor]  # u [P, R] and v [R, H]


class FactorStart(ABC):
    """Makes the first value of a task's factors u and v."""

    @abstractmethod
    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Factors u [P, R] and v [R, H] in float32."""


@final
@dataclass(frozen=True)
class OneFactors(FactorStart):
    """u v is 1 everywhere, so that each task starts from the shared prompt itself.

    Ranks beyond the first start with a random u and a v of 0: they change nothing yet, and can learn.

    Args:
        spread: Standard deviation of that u.
    """

    spread: float = 0.5

    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Factors u [P, R] and v [R, H]."""
        u, v = torch.randn(length, rank) * self.spread, torch.zeros(rank, backbone.hidden_size)
        u[:, 0], v[0] = 1.0, 1.0
        return u, v


@final
@dataclass(frozen=True)
class NormalFactors(FactorStart):
    """Each number from a normal distribution around 0, as HF PEFT has it: the prompt all but vanishes at first.

    Args:
        std: Its standard deviation; of the product of two such numbers it is the square, times the root of the rank.
    """

    std: float = 0.02

    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Factors u [P, R] and v [R, H]."""
        return torch.randn(length, rank) * self.std, torch.randn(rank, backbone.hidden_size) * self.std


@final
@dataclass(frozen=True)
class FromTasks(FactorStart):
    """Those of a trained `MPT`: the mean of its tasks' u and of their v (Wang et al. 2023, section 3.2), or one task's.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run.
        task: The task to take; None takes the mean of all.
    """

    path: str
    task: str | None = None

    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Factors u [P, R] and v [R, H].

        Raises:
            ValueError: If the file is of another backbone, holds no factors of such a task, or they have another shape.
        """
        saved = read_prompt(Path(self.path))
        saved.check(backbone, Path(self.path))
        u, v = (self._factor(saved, letter) for letter in "uv")
        wanted = [[length, rank], [rank, backbone.hidden_size]]
        if [list(u.shape), list(v.shape)] != wanted:
            raise ValueError(
                f"{self.path} has factors of shape {list(u.shape)} and {list(v.shape)}, but {wanted} is wanted; set "
                f"length to {len(u)} and rank to {len(v)}"
            )
        return u, v

    def _factor(self, saved: SavedPrompt, letter: str) -> Tensor:
        found = {
            name.removeprefix(f"{letter}."): t for name, t in saved.tensors.items() if name.startswith(f"{letter}.")
        }
        if not found or self.task not in (None, *found):
            raise ValueError(
                f"{self.path} has factors of the tasks {sorted(found)}, but {self.task or 'some'} is wanted"
            )
        return found[self.task] if self.task else torch.stack(list(found.values())).mean(0)
