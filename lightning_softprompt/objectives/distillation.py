"""Learning from the prompts of teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.files import read_prompt
from lightning_softprompt.checkpoints.restoring import Restored, restored
from lightning_softprompt.lm import PromptedLM
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.by_task import ByTask
from lightning_softprompt.objectives.context_distillation import mean_over_targets
from lightning_softprompt.types import Batch


@final
@dataclass(frozen=True)
class Distillation(Objective):
    """A loss, and how far the prompted model is from that of a teacher: L + w (KL(teacher || student) + h MSE).

    The divergence is that of the words at each target, averaged over targets; the squared distance is that of the last
    states of the input's tokens (Wang et al. 2023, arXiv 2303.02861, section 3.2). Teachers are trained beforehand,
    one for each task, on the same backbone, by any method; they stay as they are. It takes two passes beside that of L.

    Args:
        teachers: Their `prompt.safetensors` or checkpoints, in the order of the tasks; one serves all tasks.
        weight: w.
        hidden: h; unless 0 it takes two passes more.
        base: L; None takes `ByTask`, the loss that there is without teachers.
    """

    teachers: Sequence[str]
    weight: float = 0.9
    hidden: float = 0.0
    base: Objective | None = None

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """The loss, averaged over rows."""
        outcome = (self.base or ByTask())(lm, batch)
        parts = [(len(own) / len(batch), self._distance(task, lm, own)) for task, _, own in batch.by_task()]
        distance = torch.stack([share * part for share, part in parts]).sum()
        logs = {**outcome.logs, "task_loss": outcome.loss, "distillation": distance}
        return Outcome(outcome.loss + self.weight * distance, logs)

    def _distance(self, task: int, lm: PromptedLM, batch: Batch) -> Tensor:
        with torch.no_grad():
            prompt = self._teacher(task, lm.backbone).prompt(batch)
            teacher = lm.backbone(batch, prompt).float().log_softmax(-1)  # [B, U, V]
        student = lm(batch).float().log_softmax(-1)
        divergence = kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        distance = mean_over_targets(divergence, batch)
        if not self.hidden:
            return distance
        with torch.no_grad():
            wanted = lm.backbone.hidden_states(batch, prompt)[batch.mask]  # [tokens, H]
        states = lm.backbone.hidden_states(batch, lm.prompt(batch))[batch.mask]
        return distance + self.hidden * (states.float() - wanted.float()).pow(2).mean()

    def _teacher(self, task: int, backbone: Backbone) -> Restored:
        number = 0 if len(self.teachers) == 1 else task
        if number >= len(self.teachers):
            raise ValueError(f"rows are of task {task}, but there are {len(self.teachers)} teachers; name one for each")
        if number not in self._loaded:
            path = Path(self.teachers[number])
            teacher = restored(read_prompt(path), path, backbone)
            teacher.requires_grad_(False)
            self._loaded[number] = teacher
        return self._loaded[number]

    @cached_property
    def _loaded(self) -> dict[int, Restored]:
        return {}
