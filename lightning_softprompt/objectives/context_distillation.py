"""Distillation of a context into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import IGNORE, Batch, Encoded
from lightning_softprompt.objectives.base import Objective, Outcome


@final
@dataclass(frozen=True)
class ContextDistillation(Objective):
    """Cross entropy with a teacher's top tokens: - sum_v q(v) log p(v) (Eyuboglu et al. 2025, arXiv 2506.06266).

    The teacher is the backbone without prompt on the whole row; the student is the prompted backbone on the text after
    the first `{soft}`. In `"{context}{soft}{question}{target}"`, only the teacher reads the context.

    Args:
        top: Number of most probable tokens of the teacher that are used.
    """

    top: int = 20

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """Computes the loss, averaged over targets."""
        with torch.no_grad():
            teacher = lm(batch, prompted=False).float().softmax(-1)
            probabilities, words = teacher.topk(self.top)  # [B, U, top]
        student = lm(without_context(lm.backbone.codec, batch)).float().log_softmax(-1)
        losses = -(probabilities * student.gather(-1, words)).sum(-1)
        return Outcome(mean_over_targets(losses, batch))

    def count(self, batch: Batch) -> Tensor:
        """Counts the targets."""
        return (batch.targets != IGNORE).sum()


def mean_over_targets(losses: Tensor, batch: Batch) -> Tensor:
    """Averages losses [B, U] over the positions that have a target."""
    has_target = batch.targets != IGNORE
    return (losses * has_target).sum() / has_target.sum()


def without_context(codec: Codec, batch: Batch) -> Batch:
    """Returns the rows from their first slot on, after the special tokens at the start of a row."""
    rows = [_after(row, codec.start) for row in batch.require_encoded()]
    return codec.collate(rows, task_ids=batch.task_ids).to(batch.input_ids.device)


def _after(row: Encoded, start: Sequence[int]) -> Encoded:
    cut, jump = row.slots[0], len(start) - row.slots[0]
    if any(at < cut for at in row.answers):
        raise ValueError("ContextDistillation requires the first {soft} of the template before {target}")
    answers, slots = (tuple(at + jump for at in places) for places in (row.answers, row.slots))
    return Encoded((*start, *row.ids[cut:]), answers, row.targets, slots)
