"""What each passage of a question does to an answer, by leaving passages out, by gradients, and by attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_softprompt.analysis.attention_mass import SOFT, measure_attention
from lightning_softprompt.analysis.context_cite import linear_effects
from lightning_softprompt.analysis.shapley import (
    MAX_EXACT,
    leave_one_out,
    members_of,
    pair_interactions,
    shapley_values,
    subsets_to_score,
)
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, Encoded, SoftPrompt

SOFT_TOKENS = "soft tokens"  # the name of soft tokens, and of keys and values of a prompt
PASSAGE = "passage {}"  # the name of the tokens of a passage by its number, from 1
RUN, REVERSED, OTHER_QUESTION, BARE = "run", "reversed", "other question", "bare"
CONDITIONS = (RUN, REVERSED, OTHER_QUESTION, BARE)  # under which attention is measured
Arrangement = Sequence[int | None]  # the index of the passage at each position, or None for an empty position
LayerMasses = dict[str, list[float]]  # attention mass in each layer, by name of the tokens
HeadMasses = dict[str, list[list[float]]]  # attention mass in each head of each layer, by name of the tokens


class PassageRow(Protocol):
    """A question whose passages can be left out or reordered."""

    @property
    def num_passages(self) -> int:
        """Number of passages."""

    def encode(self, arrangement: Arrangement, answer: str, question: str | None = None) -> tuple[Encoded, list[str]]:
        """Returns the tokens of the row with some of its passages, and the name of each token."""


@dataclass(frozen=True)
class AnswerEffects:
    """What the passages of a row do to the log-probability of an answer, in nats.

    Args:
        text: The answer.
        num_tokens: Its number of tokens.
        log_p_none: log p(answer) without passages.
        log_p_all: log p(answer) with all passages.
        leave_one_out: How much smaller log p(answer) is without each passage.
        shapley: The mean effect of each passage over all subsets of the others. The values add up to `log_p_all` -
            `log_p_none`. None if the row has more than `MAX_EXACT` passages.
        gradient: Gradient of log p(answer) times the embeddings of each passage: a linear estimate of `leave_one_out`.
        interactions: How much the joint effect of each pair of passages exceeds their single effects, as a symmetric
            matrix. None if the row has more than `MAX_EXACT` passages.
        linear: The weight of each passage in a sparse linear model of random subsets. None if the Shapley values are
            exact.
    """

    text: str
    num_tokens: int
    log_p_none: float
    log_p_all: float
    leave_one_out: list[float]
    shapley: list[float] | None
    gradient: list[float]
    interactions: list[list[float]] | None = None
    linear: list[float] | None = None

    @property
    def effects(self) -> list[float]:
        """The Shapley value of each passage; for too many passages, its weight in the linear model."""
        for effects in (self.shapley, self.linear):
            if effects is not None:
                return effects
        return self.leave_one_out  # of a file without linear models


class PassageEffects:
    """Measures what the passages of rows do to answers.

    Args:
        backbone: The backbone.
        prompt: Computes the prompt of a batch.
        subsets_per_batch: Number of subsets of passages that run together.
    """

    def __init__(self, backbone: Backbone, prompt: Callable[[Batch], SoftPrompt], subsets_per_batch: int = 2) -> None:
        self.backbone, self.prompt, self.subsets_per_batch = backbone, prompt, subsets_per_batch

    def measure(self, row: PassageRow, answers: Sequence[str]) -> list[AnswerEffects]:
        """Returns the effects of the passages of a row on some answers, which must not be empty."""
        subsets = subsets_to_score(row.num_passages)
        log_probabilities = self.score_subsets(row, answers, subsets).tolist()
        count, full = row.num_passages, 2**row.num_passages - 1
        effects = []
        for number, answer in enumerate(answers):
            values = {subset: scores[number] for subset, scores in zip(subsets, log_probabilities, strict=True)}
            num_tokens, gradient = self._gradient(row, answer)
            is_exact = count <= MAX_EXACT
            effects_of_answer = AnswerEffects(
                text=answer,
                num_tokens=num_tokens,
                log_p_none=values[0],
                log_p_all=values[full],
                leave_one_out=leave_one_out(values, count),
                shapley=shapley_values(values, count) if is_exact else None,
                gradient=gradient,
                interactions=pair_interactions(values, count) if is_exact else None,
                linear=None if is_exact else linear_effects(values, count, num_tokens),
            )
            effects.append(effects_of_answer)
        return effects

    @torch.no_grad()
    def score_subsets(self, row: PassageRow, answers: Sequence[str], subsets: Sequence[int]) -> Tensor:
        """Returns log p(answer | passages of the subset, question) for each subset and answer, in float64.

        Subsets that are neighbors run in one batch. On the packed path, the passages that they begin with run once, as
        does the text before the answers.

        Args:
            row: The row.
            answers: The answers.
            subsets: Subsets of the passages, see `shapley`.
        """
        scores = []
        starts = range(0, len(subsets), self.subsets_per_batch)
        for start in reversed(starts):  # the longest rows first, since longer ones repeat the trial of the path
            chunk = subsets[start : start + self.subsets_per_batch]
            rows = []
            for subset in chunk:
                is_member = members_of(subset, row.num_passages)
                arrangement = [index if is_member[index] else None for index in range(row.num_passages)]
                rows += [row.encode(arrangement, answer)[0] for answer in answers]
            batch = self._collate(rows)
            log_probabilities = -self.backbone.cross_entropy(batch, self.prompt(batch)).double().sum(1)
            scores.append(log_probabilities.view(len(chunk), len(answers)).cpu())
        return torch.cat(scores[::-1])

    def _gradient(self, row: PassageRow, answer: str) -> tuple[int, list[float]]:
        """Returns the number of tokens of an answer, and gradient times input of each passage."""
        encoded, names = row.encode(range(row.num_passages), answer)
        by_token = self.gradient_times_input(self._collate([encoded])).tolist()
        totals: Counter[str] = Counter()
        for name, value in zip(names, by_token, strict=True):
            totals[name] += value
        return len(encoded.targets), [totals[PASSAGE.format(number)] for number in range(1, row.num_passages + 1)]

    def gradient_times_input(self, batch: Batch) -> Tensor:
        """Returns the gradient of log p(answer) by the embedding of each token, times the embedding [T].

        The prompt counts as constant, also if it depends on the text.

        Args:
            batch: One row.
        """
        with torch.no_grad():
            prompt = self.prompt(batch)
            embeds = self.backbone.embed(batch.input_ids)
            shift = torch.zeros_like(embeds) if prompt.shift is None else prompt.shift.expand_as(embeds).clone()
        shift.requires_grad_()
        with torch.enable_grad():
            log_probability = -self.backbone.cross_entropy(batch, replace(prompt, shift=shift)).sum()
        (gradient,) = torch.autograd.grad(log_probability, shift)
        inputs = embeds + shift.detach()
        return (gradient * inputs).sum(-1)[0].double().cpu()

    @torch.no_grad()
    def attention(
        self,
        row: PassageRow,
        arrangement: Arrangement,
        answer: str,
        question: str | None = None,
        is_prompted: bool = True,
    ) -> tuple[HeadMasses, dict[str, int]]:
        """Returns the attention mass of each part of a row in each layer and head, and the tokens of each part.

        Masses are means over the positions that predict the answer. They add up to 1 over the parts.

        Args:
            row: The row.
            arrangement: Its passages.
            answer: The answer.
            question: Another question (default: that of the row).
            is_prompted: Whether to use the prompt.

        Raises:
            ValueError: If the attentions of the backbone cannot be measured.
        """
        encoded, names = row.encode(arrangement, answer, question)
        batch = self._collate([encoded])
        prompt = self.prompt(batch) if is_prompted else SoftPrompt()
        num_tokens = Counter(names)
        parts = [SOFT_TOKENS, *num_tokens]
        numbers = [parts.index(name) for name in names]
        groups = torch.tensor([numbers], device=batch.input_ids.device)
        assert parts[SOFT] == SOFT_TOKENS
        masses = measure_attention(self.backbone, batch, prompt, groups, len(parts))  # [L, 1, U, heads, G]
        by_head = masses.double().mean((1, 2)).permute(2, 0, 1).tolist()
        num_tokens[SOFT_TOKENS] = prompt_length(prompt)
        return dict(zip(parts, by_head, strict=True)), dict(num_tokens)

    def attention_by_condition(
        self, row: PassageRow, answer: str, other_question: str
    ) -> tuple[dict[str, HeadMasses], dict[str, int]]:
        """Returns the attention of a row and of its controls, and the number of tokens of each part of the row.

        The controls are `REVERSED` order of the passages, `OTHER_QUESTION`, and `BARE` without the prompt, if there is
        one.

        Args:
            row: The row.
            answer: The answer.
            other_question: A question that the passages do not belong to.
        """
        order = range(row.num_passages)
        attention = {}
        attention[RUN], num_tokens = self.attention(row, order, answer)
        attention[REVERSED], _ = self.attention(row, order[::-1], answer)
        attention[OTHER_QUESTION], _ = self.attention(row, order, answer, other_question)
        if self.has_prompt(row, answer):
            attention[BARE], _ = self.attention(row, order, answer, is_prompted=False)
        return attention, num_tokens

    @torch.no_grad()
    def has_prompt(self, row: PassageRow, answer: str) -> bool:
        """Returns whether the method adds anything to the backbone."""
        encoded, _ = row.encode(range(row.num_passages), answer)
        prompt = self.prompt(self._collate([encoded]))
        return bool(prompt_length(prompt)) or prompt.shift is not None or bool(prompt.hidden)

    def _collate(self, rows: Sequence[Encoded]) -> Batch:
        return self.backbone.codec.collate(rows).to(self.backbone.word_embeddings.device)


def prompt_length(prompt: SoftPrompt) -> int:
    """Returns the number of soft tokens of a prompt, or of its keys and values."""
    length = 0 if prompt.tokens is None else prompt.tokens.shape[1]
    for layers in prompt.kv.values():
        length += max(key.shape[2] for key, _ in layers.values())
    return length


def mean_over_heads(masses: Mapping[str, Sequence[Sequence[float]]]) -> LayerMasses:
    """Returns the attention mass of each part in each layer, as the mean over heads."""
    means = {}
    for name, by_layer in masses.items():
        means[name] = [sum(by_head) / len(by_head) for by_head in by_layer]
    return means


def select_passages(attention: Mapping[str, HeadMasses], num_passages: int) -> dict[str, HeadMasses]:
    """Returns the attention of each head to each passage, with the passages in the order of the run and reversed.

    Args:
        attention: Attention by condition, see `PassageEffects.attention_by_condition`.
        num_passages: Number of passages.
    """
    names = [PASSAGE.format(number) for number in range(1, num_passages + 1)]
    selected: dict[str, HeadMasses] = {}
    for condition in (RUN, REVERSED):
        if condition in attention:
            masses = attention[condition]
            selected[condition] = {name: masses[name] for name in names if name in masses}
    return selected


def passage_masses(masses: Mapping[str, Sequence[float]], num_passages: int) -> list[float]:
    """Returns the attention mass of each passage, as the mean over layers."""
    means = []
    for number in range(1, num_passages + 1):
        by_layer = masses.get(PASSAGE.format(number), [0.0])
        means.append(sum(by_layer) / len(by_layer))
    return means
