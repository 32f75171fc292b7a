"""Distillation from trained prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.context_cache import ContextCache
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.frozen_role import SavedRole, autocast_dtype, digest
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.by_task import ByTask
from lightning_softprompt.system.cache_dirs import cache_folder


@dataclass(frozen=True)
class Teacher:
    """A trained prompt to distill from.

    Args:
        role: The trained method.
        answers: Cache of its log-probabilities, by row.
    """

    role: SavedRole
    answers: ContextCache

    def answer(self, backbone: Backbone, batch: Batch) -> list[Tensor]:
        """Computes the log-probabilities [targets, V] of each row."""
        logits = backbone(batch, self.role.method.prompt(backbone.prompt_view(batch)))
        rows = zip(logits, batch.targets != IGNORE, strict=True)
        return [row[has_target].float().log_softmax(-1) for row, has_target in rows]


@final
@dataclass(frozen=True)
class Distillation(Objective):
    """A base loss plus the distance to a teacher: L + w (KL(teacher || student) + h MSE).

    The divergence is between the token distributions at each target, averaged over targets; the squared error is
    between the final states of the input tokens (Wang et al. 2023, arXiv 2303.02861, section 3.2). Teachers are trained
    in earlier runs, one per task, on the same backbone, by any method, and stay frozen. Each step takes two forward
    passes in addition to that of L. The log-probabilities of teachers can be cached on disk, which saves one of the two
    when a row is seen again, at 4 bytes per target and word of the vocabulary.

    Args:
        teachers: `prompt.safetensors` files or checkpoints of the teachers, in the order of the tasks, or one for all.
        weight: w.
        hidden: h; if it is not 0, each step takes two more forward passes.
        base: L (default: `ByTask`, the loss without teachers).
        disk: Limit of the cache of each teacher in MiB; the oldest entries are evicted. 0 disables the cache.
    """

    teachers: Sequence[str]
    weight: float = 0.9
    hidden: float = 0.0
    base: Objective | None = None
    disk: int = 0

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over rows."""
        outcome = (self.base or ByTask())(lm, batch)
        parts = []
        for task, _, rows_of_task in batch.by_task():
            share = len(rows_of_task) / len(batch)
            parts.append(share * self._distance(task, lm, rows_of_task))
        distance = torch.stack(parts).sum()
        logs = {**outcome.logs, "task_loss": outcome.loss, "distillation": distance}
        return Outcome(outcome.loss + self.weight * distance, logs)

    def count(self, batch: Batch) -> Tensor:
        """Counts the terms of L."""
        return (self.base or ByTask()).count(batch)

    def _distance(self, task: int, lm: PromptedLM, batch: Batch) -> Tensor:
        teacher = self._teacher(task, lm.backbone)
        target = self._teacher_log_probabilities(teacher, lm, batch)
        student = lm(batch)[batch.targets != IGNORE].float().log_softmax(-1)  # [targets, V]
        distance = kl_div(student, target, reduction="none", log_target=True).sum(-1).mean()
        if not self.hidden:
            return distance
        with torch.no_grad():
            prompt = teacher.role.method.prompt(lm.backbone.prompt_view(batch))
            target_states = lm.backbone.hidden_states(batch, prompt)[batch.mask]  # [tokens, H]
        states = lm.backbone.hidden_states(batch, lm.prompt(batch))[batch.mask]
        squared_error = (states.float() - target_states.float()).pow(2).mean()
        return distance + self.hidden * squared_error

    @torch.no_grad()
    def _teacher_log_probabilities(self, teacher: Teacher, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the log-probabilities [targets, V] of a teacher, from the cache if it is enabled."""
        answer = cache(lambda: teacher.answer(lm.backbone, batch))
        if not self.disk:
            return torch.cat(answer())
        device = batch.targets.device
        precision = autocast_dtype(device)

        def answer_of_row(b: int) -> Tensor:
            return answer()[b]

        # A row's entry comes from a pass over the whole batch in which it is first seen, so that a resumed run reads
        # what an uninterrupted run computes.
        answers = []
        for b, row in enumerate(batch.require_encoded()):
            key = digest(row._replace(num_truncated=0), precision)
            answers.append(teacher.answers.get(key, partial(answer_of_row, b)))
        return torch.cat([row_answer.to(device) for row_answer in answers])

    def _teacher(self, task: int, backbone: Backbone) -> Teacher:
        number = 0 if len(self.teachers) == 1 else task
        if number >= len(self.teachers):
            raise ValueError(
                f"rows are of task {task}, but there are {len(self.teachers)} teachers; give one for each task"
            )
        if number not in self._loaded:
            role = SavedRole.load(Path(self.teachers[number]), backbone)
            self._loaded[number] = Teacher(role, self._create_cache(role, backbone))
        return self._loaded[number]

    def _create_cache(self, role: SavedRole, backbone: Backbone) -> ContextCache:
        """Creates the cache of a teacher's answers, in a folder that depends on prompt, backbone and precision."""
        key = digest(role.identity, role.saved.method, backbone.fingerprint(), backbone.spec.dtype)
        folder = cache_folder("teachers", key)
        return ContextCache(memory=0, disk=self.disk * 2**20, folder=folder)

    @cached_property
    def _loaded(self) -> dict[int, Teacher]:
        return {}
