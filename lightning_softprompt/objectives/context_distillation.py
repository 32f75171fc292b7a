"""Answering without a context as the bare backbone does with it."""

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
    """Cross entropy with a teacher's likeliest tokens: - sum_v q(v) log p(v) (Eyuboglu et al. 2025, arXiv 2506.06266).

    The teacher is the bare backbone on the whole row, the student the prompted one on what stands behind the first
    `{soft}`: in `"{context}{soft}{question}{target}"` only the teacher reads the context.

    Args:
        top: Tokens of the teacher's that count, the likeliest ones.
    """

    top: int = 20

    def __call__(self, lm: PromptedLM, batch: Batch) -> Outcome:
        """The loss, averaged over targets."""
        with torch.no_grad():
            share, words = lm(batch, prompted=False).float().softmax(-1).topk(self.top)  # [B, U, top]
        student = lm(without_context(lm.backbone.codec, batch)).float().log_softmax(-1)
        return Outcome(mean_over_targets(-(share * student.gather(-1, words)).sum(-1), batch))

    def count(self, batch: Batch) -> Tensor:
        """Targets."""
        return (batch.targets != IGNORE).sum()


def mean_over_targets(losses: Tensor, batch: Batch) -> Tensor:
    """Of [B, U], where there is a target."""
    said = batch.targets != IGNORE
    return (losses * said).sum() / said.sum()


def without_context(codec: Codec, batch: Batch) -> Batch:
    """The rows from their first slot on, behind the tokens that open a row."""
    rows = [_after(row, codec.start) for row in codec.unpack(batch)]
    return codec.collate(rows, task_ids=batch.task_ids).to(batch.input_ids.device)


def _after(row: Encoded, start: Sequence[int]) -> Encoded:
    cut, jump = row.slots[0], len(start) - row.slots[0]
    if any(at < cut for at in row.answers):
        raise ValueError("ContextDistillation wants the first {soft} of the template before {target}")
    answers, slots = (tuple(at + jump for at in places) for places in (row.answers, row.slots))
    return Encoded((*start, *row.ids[cut:]), answers, row.targets, slots)
