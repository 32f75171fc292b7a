"""Penalties: loss terms that regularize the soft tokens of any method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Literal, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, Batch, SoftPrompt

STEEPNESS, EPOCHS = 0.2, 50  # of the schedule of Nemesis, which is defined for 50 epochs


class Penalty(ABC):
    """A term that is added to the loss."""

    @property
    def name(self) -> str:
        """Name in logs: the class name in lower case."""
        return type(self).__name__.lower()

    @abstractmethod
    def __call__(self, lm: PromptedLM, batch: Batch, progress: float) -> Tensor:
        """Computes the weighted penalty, a scalar.

        Args:
            lm: Backbone with the method's prompt.
            batch: Batch of the step.
            progress: Training progress in [0, 1].
        """


@final
@dataclass(frozen=True)
class UniformNorm(Penalty):
    """The mean norm of the soft tokens (Fu et al. 2024, Nemesis, arXiv 2408.13979, position-uniform normalization).

    Differences from the paper: by default, norms are relative to the mean norm of the backbone's word embeddings, so
    that a weight has the same effect on every backbone.

    Args:
        weight: alpha.
        order: q of the norm: 1, 2 or infinity.
        schedule: `decay` lowers the weight to zero along a logistic curve over the training; `constant` keeps it.
        relative: Whether norms are divided by the mean norm of the word embeddings.
    """

    weight: float = 1.0
    order: float = 2.0
    schedule: Literal["decay", "constant"] = "decay"
    relative: bool = True

    def __call__(self, lm: PromptedLM, batch: Batch, progress: float) -> Tensor:
        """Computes the weighted penalty, a scalar."""
        norms = token_norms(lm, batch, self.order, self.relative)
        return self.weight * schedule_factor(self.schedule, progress) * norms.mean()


@final
@dataclass(frozen=True)
class AwareNorm(Penalty):
    """The norm of soft tokens that improve accuracy when scaled down (Nemesis, position-aware normalization).

    Each step tests some positions without gradient. If the accuracy on the batch rises when the token is scaled down,
    its norm is penalized. Each tested position costs a forward pass.

    Args:
        weight: alpha.
        positions: Number of randomly drawn positions per step.
        scale: tau, the factor by which a token is scaled down.
        order: q of the norm: 1, 2 or infinity.
        schedule: See `UniformNorm`.
        relative: See `UniformNorm`.
        tested: Whether positions are tested. If not, all drawn positions are penalized, as a control.
    """

    weight: float = 1.0
    positions: int = 1
    scale: float = 0.1
    order: float = 2.0
    schedule: Literal["decay", "constant"] = "decay"
    relative: bool = True
    tested: bool = True

    def __call__(self, lm: PromptedLM, batch: Batch, progress: float) -> Tensor:
        """Computes the weighted penalty, a scalar."""
        norms = token_norms(lm, batch, self.order, self.relative)  # [B|1, P]
        positions = torch.randperm(norms.shape[1])[: self.positions].tolist()
        if self.tested:
            positions = self._find_improving(lm, batch, positions)
        total = norms[:, positions].sum(1).mean()
        return self.weight * schedule_factor(self.schedule, progress) * total / max(1, len(positions))

    @torch.no_grad()
    def _find_improving(self, lm: PromptedLM, batch: Batch, positions: Sequence[int]) -> list[int]:
        """Positions where the accuracy rises if the token is scaled down."""
        if batch.labels is None:
            raise ValueError("AwareNorm requires rows with labels to measure accuracy; use UniformNorm")
        before = accuracy(lm, batch)
        improving = []
        for position in positions:
            scaled = scale_tokens(lm, batch, [position], self.scale)
            if accuracy(scaled, batch) > before:
                improving.append(position)
        return improving


@final
@dataclass(frozen=True)
class Wayward(Penalty):
    """The mean squared distance of soft tokens to a text's (Khashabi et al. 2022, arXiv 2112.08348, equation 3).

    Args:
        text: Soft token i is kept near the embedding of token i of this text; further soft tokens are free.
        weight: gamma.
    """

    text: str
    weight: float = 0.01

    def __call__(self, lm: PromptedLM, batch: Batch, progress: float) -> Tensor:
        """Computes the weighted penalty, a scalar."""
        tokens = soft_tokens(lm, batch)
        ids = lm.backbone.codec.template_ids(self.text)[: tokens.shape[1]]
        words = lm.backbone.embed(torch.tensor(ids, device=tokens.device)).to(tokens)
        distance = tokens[:, : len(ids)] - words
        return self.weight * distance.pow(2).sum(-1).mean()


def schedule_factor(schedule: str, progress: float) -> float:
    """Computes omega, the factor of a weight: 1 - 1 / (1 + exp(-0.2 (E - E_max / 2))) for 50 epochs."""
    if schedule == "constant":
        return 1.0
    exponent = -STEEPNESS * EPOCHS * (progress - 0.5)
    return 1 - 1 / (1 + exp(exponent))


def soft_tokens(lm: PromptedLM, batch: Batch) -> Tensor:
    """Returns the soft tokens [B|1, P, H] of the batch.

    Raises:
        ValueError: If the method has none.
    """
    tokens = lm.prompt(batch).tokens
    if tokens is None:
        raise ValueError("`penalties` names a penalty on soft tokens, but the method has none; remove the penalty")
    return tokens


def token_norms(lm: PromptedLM, batch: Batch, order: float, relative: bool) -> Tensor:
    """Computes the norms [B|1, P] of the soft tokens in float32."""
    norms = soft_tokens(lm, batch).float().norm(order, dim=-1)
    if not relative:
        return norms
    word_norm = lm.backbone.word_embeddings.float().norm(order, dim=-1).mean()
    return norms / (lm.backbone.embedding_scale * word_norm)


def scale_tokens(lm: PromptedLM, batch: Batch, positions: Sequence[int], scale: float) -> PromptedLM:
    """Returns the model with the soft tokens at some positions scaled, in every row that it processes.

    Raises:
        ValueError: If the batch has no soft tokens.
    """
    factors = soft_tokens(lm, batch).new_ones(soft_tokens(lm, batch).shape[1], 1)  # [P, 1]
    factors[list(positions)] = scale

    def scaled(rows: Batch) -> SoftPrompt:
        prompt = lm.prompt(rows)
        return prompt if prompt.tokens is None else replace(prompt, tokens=prompt.tokens * factors)

    return lm.with_method(scaled)


def replace_with_noise(lm: PromptedLM, batch: Batch, positions: Sequence[int], deviation: float) -> PromptedLM:
    """Returns the model with the soft tokens at some positions replaced by noise, the same in every row.

    Raises:
        ValueError: If the batch has no soft tokens.
    """
    noise = torch.randn_like(soft_tokens(lm, batch)[0, list(positions)]) * deviation  # [positions, H]

    def replaced(rows: Batch) -> SoftPrompt:
        prompt = lm.prompt(rows)
        if prompt.tokens is None:
            return prompt
        tokens = prompt.tokens.clone()
        tokens[:, list(positions)] = noise
        return replace(prompt, tokens=tokens)

    return lm.with_method(replaced)


def count_correct(lm: PromptedLM, batch: Batch) -> int:
    """Counts the rows, or words, whose class has the highest score."""
    assert batch.labels is not None
    return int((lm.scores(batch).argmax(-1) == batch.labels).sum())


def count_labelled(batch: Batch) -> int:
    """Counts the rows, or words, that have a class."""
    assert batch.labels is not None
    return int((batch.labels != IGNORE).sum())


def accuracy(lm: PromptedLM, batch: Batch) -> float:
    """Computes the accuracy of the class scores on a batch."""
    return count_correct(lm, batch) / count_labelled(batch)
