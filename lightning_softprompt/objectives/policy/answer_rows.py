"""Sampled answers as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_softprompt.backbones.generation.answers import answer_lengths, answer_texts, are_finished
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch
from lightning_softprompt.objectives.policy.estimators import estimate_divergences, sum_tokens
from lightning_softprompt.objectives.policy.experience import Experience


def describe_answers(lm: PromptedLM, experience: Experience, part_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each answer: its question, text, reward, mean advantage, tokens, and whether it ends.

    Rows also have the divergence from the reference if the log-probabilities of policy and reference are known.

    Args:
        lm: The language model.
        experience: The answers, B rows.
        part_names: Names of the parts of the reward.
    """
    assert experience.groups is not None
    mask = experience.answer_mask
    parts = {f"reward_{name}": experience.parts[:, i].tolist() for i, name in enumerate(part_names)}
    advantages = sum_tokens(experience.advantages, mask) / mask.sum(1).clamp(min=1)
    columns: dict[str, list[Any]] = {
        "question": experience.groups.tolist(),
        "input": question_texts(lm, experience),
        "answer": answer_texts(lm, experience),
        "reward": experience.rewards.tolist(),
        **parts,
        "advantage": advantages.tolist(),
        "tokens": answer_lengths(experience).tolist(),
        "finished": are_finished(lm, experience).tolist(),
    }
    old, reference = experience.old_logprobs, experience.reference_logprobs
    if old is not None and reference is not None:
        columns["kl"] = sum_tokens(estimate_divergences(old, reference).k1, mask).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def question_texts(lm: PromptedLM, batch: Batch) -> list[str]:
    """Returns the questions of a batch as text."""
    questions = lm.backbone.without_answers(batch)
    codec = lm.backbone.codec
    return codec.decode(questions.input_ids.masked_fill(~questions.mask.bool(), codec.pad_id))
