"""Initializers of the factors that adapt a shared prompt to each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt
from lightning_softprompt.checkpoints.prompt_sources import report_prompt_source

Factors = tuple[Tensor, Tensor]  # u [P, R] and v [R, H]


class FactorStart(ABC):
    """Creates the initial factors u and v of a task."""

    @abstractmethod
    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Returns factors u [P, R] and v [R, H] in float32."""


@final
@dataclass(frozen=True)
class OneFactors(FactorStart):
    """Factors with u v = 1, so that each task starts from the shared prompt.

    Ranks beyond the first start with a random u and v = 0: they have no initial effect, but can be trained.

    Args:
        spread: Standard deviation of that random u.
    """

    spread: float = 0.5

    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Returns factors u [P, R] and v [R, H]."""
        u = torch.randn(length, rank) * self.spread
        v = torch.zeros(rank, backbone.hidden_size)
        u[:, 0], v[0] = 1.0, 1.0
        return u, v


@final
@dataclass(frozen=True)
class NormalFactors(FactorStart):
    """Values drawn from a normal distribution around 0, as in HF PEFT: the initial prompt is almost zero.

    Args:
        std: Standard deviation of u and v; that of the product is its square times the square root of the rank.
    """

    std: float = 0.02

    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Returns factors u [P, R] and v [R, H]."""
        u = torch.randn(length, rank)
        v = torch.randn(rank, backbone.hidden_size)
        return u * self.std, v * self.std


@final
@dataclass(frozen=True)
class FromTasks(FactorStart):
    """Factors of a trained `MPT`: the mean of u and of v over its tasks (Wang et al. 2023, section 3.2), or one task's.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run.
        task: Task whose factors are used (default: the mean over all tasks).
    """

    path: str
    task: str | None = None

    def __call__(self, backbone: Backbone, length: int, rank: int) -> Factors:
        """Returns factors u [P, R] and v [R, H].

        Raises:
            ValueError: If the file belongs to another backbone, has no factors of the task, or they have another
                shape.
        """
        saved = read_prompt(Path(self.path))
        report_prompt_source(Path(self.path))
        saved.check(backbone, Path(self.path))
        u, v = (self._factor(saved, letter) for letter in "uv")
        shapes = [list(u.shape), list(v.shape)]
        expected = [[length, rank], [rank, backbone.hidden_size]]
        if shapes != expected:
            raise ValueError(
                f"{self.path} has factors of the shapes {shapes}, expected {expected}; set length to {len(u)} and rank "
                f"to {len(v)}"
            )
        return u, v

    def _factor(self, saved: SavedPrompt, letter: str) -> Tensor:
        prefix = f"{letter}."
        names = [name for name in saved.tensors if name.startswith(prefix)]
        factors = {name.removeprefix(prefix): saved.tensors[name] for name in names}
        if not factors or self.task not in (None, *factors):
            expected = self.task or "at least one task"
            raise ValueError(f"{self.path} has factors of the tasks {sorted(factors)}, expected {expected}")
        if self.task:
            return factors[self.task]
        return torch.stack(list(factors.values())).mean(0)
