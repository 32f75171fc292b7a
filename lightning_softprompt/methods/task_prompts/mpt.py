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
    """One prompt for all tasks, multiplied number by number with a low-rank matrix of each: P_k = P o (u_k v_k).

    The tasks are those of `MultitaskDataModule`; with any other data there is one. Sources are trained with the
    objective `Distillation` on prompts of their own; targets then start from what came of it, with
    `init: {class_path: FromCheckpoint, init_args: {path: FILE, name: shared}}` and
    `start: {class_path: FromTasks, init_args: {path: FILE}}`.

    Paper: Wang et al. 2023, arXiv 2303.02861
    Enters: soft tokens at the template's first slot, other ones for each task
    Parameters: P * H + K * R * (P + H)

    Differences from the paper: a rank, as in HF PEFT; u and v start at 1, not near 0, where the first prompt is
    0.0004 of P and, in backbones that add positions to it, so is P's gradient (`NormalFactors`). A batch is of one
    task, unless the data's `together` draws several at random, as in the paper.

    Args:
        length: P.
        rank: R of each task's matrix.
        factors_lr: Learning rate of u and v; P takes the optimizer's. They act on P as factors, and P is small.
        init: Where P starts; None draws words of the vocabulary.
        start: Where u and v start; None takes 1.
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
        """Makes `shared` [P, H], and for each task `u` [P, R] and `v` [R, H]."""
        self.names = self.tasks or (ONLY,)
        self.shared = nn.Parameter(self.init(backbone, self.length))
        starts = {name: self.start(backbone, self.length, self.rank) for name in self.names}
        self.u = nn.ParameterDict({name: nn.Parameter(u) for name, (u, _) in starts.items()})
        self.v = nn.ParameterDict({name: nn.Parameter(v) for name, (_, v) in starts.items()})

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Two learning rates."""
        return self.split_groups("factors", [*self.u.values(), *self.v.values()], self.factors_lr)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Each row's task's own; the same for every row where they are of one task."""
        rows = task_of_rows(batch, self.names)
        u, v = (torch.stack([factors[name] for name in self.names])[rows] for factors in (self.u, self.v))
        return SoftPrompt(tokens=self.shared * (u @ v))
