"""Multitask prompt tuning (Wang et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.init import Init, SampleVocabulary
from lightning_softprompt.prompts.task_factors import FactorStart, OneFactors
from lightning_softprompt.prompts.task_ids import ONLY, task_of_rows


class MPT(SoftPromptModule):
    """One prompt for all tasks, multiplied elementwise with a low-rank matrix per task: P_k = P o (u_k v_k).

    The tasks are those of `MultitaskDataModule`; any other data module has one task. Train the source tasks with the
    objective `Distillation`, with one teacher prompt per task. Then initialize the target tasks from the result with
    `init: {class_path: FromCheckpoint, init_args: {path: FILE, name: shared}}` and
    `start: {class_path: FromTasks, init_args: {path: FILE}}`.

    Paper: Wang et al. 2023, arXiv 2303.02861
    Enters: soft tokens at the template's first slot, one prompt per task
    Parameters: P * H + K * R * (P + H)

    Differences from the paper: a rank, as in HF PEFT; u and v start at 1, not near 0, where the initial prompt is
    0.0004 of P, and so is the gradient of P in backbones that add positions (`NormalFactors`). A batch belongs to one
    task, unless `--data.together` samples several tasks at random, as in the paper.

    Args:
        length: P, the number of soft tokens.
        rank: R, rank of each task's matrix.
        factors_lr: Learning rate of u and v, which scale P; P uses the optimizer's.
        init: Initial P (default: embeddings of words sampled from the vocabulary).
        start: Initial u and v (default: 1).
        common: Arguments of every method.
    """

    def __init__(
        self,
        length: int = 20,
        rank: int = 1,
        factors_lr: float = 0.02,
        init: Init | None = None,
        start: FactorStart | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if length < 1 or rank < 1:
            raise ValueError(f"length and rank must be at least 1, got {length} and {rank}")
        self.length, self.rank, self.factors_lr = length, rank, factors_lr
        self.init, self.start = init or SampleVocabulary(), start or OneFactors()

    def build(self, backbone: Backbone) -> None:
        """Creates `shared` [P, H], and for each task `u` [P, R] and `v` [R, H]."""
        self.names = self.tasks or (ONLY,)
        self.shared = nn.Parameter(self.init(backbone, self.length))
        starts = {name: self.start(backbone, self.length, self.rank) for name in self.names}
        self.u = nn.ParameterDict({name: nn.Parameter(u) for name, (u, _) in starts.items()})
        self.v = nn.ParameterDict({name: nn.Parameter(v) for name, (_, v) in starts.items()})

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Returns parameter groups with two learning rates."""
        return self.split_groups("factors", [*self.u.values(), *self.v.values()], self.factors_lr)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the prompt of each row's task; one prompt if all rows belong to one task."""
        rows = task_of_rows(batch, self.names)
        u = torch.stack([self.u[name] for name in self.names])[rows]
        v = torch.stack([self.v[name] for name in self.names])[rows]
        return SoftPrompt(tokens=self.shared * (u @ v))
