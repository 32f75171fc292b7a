"""Learning from the prompts of teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import final

import torch
from platformdirs import user_cache_path
from torch import Tensor
from torch.nn.functional import kl_div

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.context_cache import ContextCache
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.prompt_file import read_prompt, weights_identity
from lightning_softprompt.checkpoints.restore import LoadedMethod, load_method
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.objectives.base import Objective, Outcome
from lightning_softprompt.objectives.by_task import ByTask


@dataclass(frozen=True)
class Teacher:
    """A trained prompt to learn from.

    Args:
        method: Gives its prompts.
        answers: What it said, by row.
    """

    method: LoadedMethod
    answers: ContextCache

    @classmethod
    def of(cls, path: Path, backbone: Backbone, disk: int) -> Teacher:
        """That of a file."""
        saved = read_prompt(path)
        method = load_method(saved, path, backbone)
        method.requires_grad_(False)
        whose = digest(weights_identity(saved.tensors), saved.method, backbone.fingerprint(), backbone.spec.dtype)
        folder = user_cache_path("lightning-softprompt") / "teachers" / whose
        return cls(method, ContextCache(memory=0, disk=disk * 2**20, folder=folder))

    def answer(self, backbone: Backbone, batch: Batch) -> list[Tensor]:
        """[targets, V] of each row, log-probabilities of words."""
        logits = backbone(batch, self.method.prompt(batch))
        each = zip(logits, batch.targets != IGNORE, strict=True)
        return [row[said].float().log_softmax(-1) for row, said in each]


@final
@dataclass(frozen=True)
class Distillation(Objective):
    """A loss, and how far the prompted model is from that of a teacher: L + w (KL(teacher || student) + h MSE).

    The divergence is that of the words at each target, averaged over targets; the squared distance is that of the last
    states of the input's tokens (Wang et al. 2023, arXiv 2303.02861, section 3.2). Teachers are trained beforehand,
    one for each task, on the same backbone, by any method; they stay as they are. It takes two passes beside that of L.
    What teachers say may be kept on disk, by teacher and row, which spares one of the two where a row comes again; it
    takes 4 bytes for each target and word of the vocabulary.

    Args:
        teachers: Their `prompt.safetensors` or checkpoints, in the order of the tasks; one serves all tasks.
        weight: w.
        hidden: h; unless 0 it takes two passes more.
        base: L; None takes `ByTask`, the loss that there is without teachers.
        disk: Most MiB of each teacher's answers on disk, the oldest first to go; 0 computes them each time.
    """

    teachers: Sequence[str]
    weight: float = 0.9
    hidden: float = 0.0
    base: Objective | None = None
    disk: int = 0

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """The loss, averaged over rows."""
        outcome = (self.base or ByTask())(lm, batch)
        parts = [(len(own) / len(batch), self._distance(task, lm, own)) for task, _, own in batch.by_task()]
        distance = torch.stack([share * part for share, part in parts]).sum()
        logs = {**outcome.logs, "task_loss": outcome.loss, "distillation": distance}
        return Outcome(outcome.loss + self.weight * distance, logs)

    def count(self, batch: Batch) -> Tensor:
        """As many as L has."""
        return (self.base or ByTask()).count(batch)

    def _distance(self, task: int, lm: PromptedLM, batch: Batch) -> Tensor:
        teacher = self._teacher(task, lm.backbone)
        said = self._teacher_log_probabilities(teacher, lm, batch)
        student = lm(batch)[batch.targets != IGNORE].float().log_softmax(-1)  # [targets, V]
        distance = kl_div(student, said, reduction="none", log_target=True).sum(-1).mean()
        if not self.hidden:
            return distance
        with torch.no_grad():
            wanted = lm.backbone.hidden_states(batch, teacher.method.prompt(batch))[batch.mask]  # [tokens, H]
        states = lm.backbone.hidden_states(batch, lm.prompt(batch))[batch.mask]
        return distance + self.hidden * (states.float() - wanted.float()).pow(2).mean()

    @torch.no_grad()
    def _teacher_log_probabilities(self, teacher: Teacher, lm: PromptedLM, batch: Batch) -> Tensor:
        """[targets, V] log-probabilities of a teacher's."""
        answer = cache(lambda: teacher.answer(lm.backbone, batch))
        if not self.disk:
            return torch.cat(answer())
        rows, kind = enumerate(lm.backbone.codec.unpack(batch)), batch.targets.device.type
        way = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

        def of_row(b: int) -> Tensor:
            return answer()[b]

        # A row's are those of its first batch, of all of it: a run that goes on finds what it would have computed.
        kept = [teacher.answers.get(digest(row, way), partial(of_row, b)) for b, row in rows]
        return torch.cat([one.to(batch.targets.device) for one in kept])

    def _teacher(self, task: int, backbone: Backbone) -> Teacher:
        number = 0 if len(self.teachers) == 1 else task
        if number >= len(self.teachers):
            raise ValueError(f"rows are of task {task}, but there are {len(self.teachers)} teachers; name one for each")
        if number not in self._loaded:
            self._loaded[number] = Teacher.of(Path(self.teachers[number]), backbone, self.disk)
        return self._loaded[number]

    @cached_property
    def _loaded(self) -> dict[int, Teacher]:
        return {}


def digest(*said: object) -> str:
    """A hash of values by their representation."""
    return blake2b(repr(said).encode(), digest_size=16).hexdigest()
