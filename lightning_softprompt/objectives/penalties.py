"""Terms of the loss that keep soft tokens where they should be, for any method that has some."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Literal, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, Batch

STEEPNESS, EPOCHS = 0.2, 50  # of Nemesis's schedule, and the epochs that it was made for


class Penalty(ABC):
    """What is added to the loss."""

    @property
    def name(self) -> str:
        """In logs: the class's, in lower case."""
        return type(self).__name__.lower()

    @abstractmethod
    def __call__(self, lm: PromptedLM, batch: Batch, done: float) -> Tensor:
        """A scalar, weighed.

        Args:
            lm: Backbone and method.
            batch: The step's.
            done: The share of training that is behind, from 0 to 1.
        """


@final
@dataclass(frozen=True)
class UniformNorm(Penalty):
    """The mean norm of the soft tokens (Fu et al. 2024, Nemesis, arXiv 2408.13979, position-uniform normalization).

    Differences from the paper: norms are relative to the mean norm of the backbone's word embeddings, unless told
    otherwise, so that a weight means the same on every backbone.

    Args:
        weight: alpha.
        order: q of the norm: 1, 2 or infinity.
        schedule: `decay` goes from the whole weight to none, as a logistic curve over the training; `constant` stays.
        relative: Whether norms are relative to those of words.
    """

    weight: float = 1.0
    order: float = 2.0
    schedule: Literal["decay", "constant"] = "decay"
    relative: bool = True

    def __call__(self, lm: PromptedLM, batch: Batch, done: float) -> Tensor:
        """A scalar."""
        return self.weight * share(self.schedule, done) * norms(lm, batch, self.order, self.relative).mean()


@final
@dataclass(frozen=True)
class AwareNorm(Penalty):
    """The norm of those soft tokens that do better smaller (Nemesis, position-aware normalization).

    At each step, some positions are tried out without gradient: where the batch's accuracy rises as the token is scaled
    down, its norm is penalised. Costs a forward pass for each position tried.

    Args:
        weight: alpha.
        positions: How many are tried a step, drawn at random.
        scale: tau, by which a token is scaled down.
        order: q of the norm: 1, 2 or infinity.
        schedule: As of `UniformNorm`.
        relative: As of `UniformNorm`.
        tested: Whether positions are tried out; without, those drawn are penalised as they are, which is the control.
    """

    weight: float = 1.0
    positions: int = 1
    scale: float = 0.1
    order: float = 2.0
    schedule: Literal["decay", "constant"] = "decay"
    relative: bool = True
    tested: bool = True

    def __call__(self, lm: PromptedLM, batch: Batch, done: float) -> Tensor:
        """A scalar."""
        size = norms(lm, batch, self.order, self.relative)  # [B|1, P]
        drawn = torch.randperm(size.shape[1])[: self.positions].tolist()
        kept = self._better(lm, batch, drawn) if self.tested else drawn
        return self.weight * share(self.schedule, done) * size[:, kept].sum(1).mean() / max(1, len(kept))

    @torch.no_grad()
    def _better(self, lm: PromptedLM, batch: Batch, drawn: Sequence[int]) -> list[int]:
        if batch.labels is None:
            raise ValueError("AwareNorm wants rows with labels, since it asks whether accuracy rises; take UniformNorm")
        right = accuracy(lm, batch)
        return [p for p in drawn if accuracy(rescaled(lm, batch, [p], self.scale), batch) > right]


@final
@dataclass(frozen=True)
class Wayward(Penalty):
    """The mean squared distance of the soft tokens from a text's (Khashabi et al. 2022, arXiv 2112.08348, equation 3).

    Args:
        text: Whose token i soft token i is kept near; soft tokens past its end are free.
        weight: gamma.
    """

    text: str
    weight: float = 0.01

    def __call__(self, lm: PromptedLM, batch: Batch, done: float) -> Tensor:
        """A scalar."""
        tokens = soft_tokens(lm, batch)
        ids = torch.tensor(lm.backbone.codec.template_ids(self.text)[: tokens.shape[1]], device=tokens.device)
        words = lm.backbone.embed(ids).to(tokens)
        return self.weight * (tokens[:, : len(ids)] - words).pow(2).sum(-1).mean()


def share(schedule: str, done: float) -> float:
    """omega, the share of a weight that is left: 1 - 1 / (1 + exp(-0.2 (E - E_max / 2))) for 50 epochs."""
    return 1.0 if schedule == "constant" else 1 - 1 / (1 + exp(-STEEPNESS * EPOCHS * (done - 0.5)))


def soft_tokens(lm: PromptedLM, batch: Batch) -> Tensor:
    """[B|1, P, H] of the batch.

    Raises:
        ValueError: If the method has none.
    """
    tokens = lm.prompt(batch).tokens
    if tokens is None:
        raise ValueError("a penalty on soft tokens was asked for, but the method has none; leave it out of `penalties`")
    return tokens


def norms(lm: PromptedLM, batch: Batch, order: float, relative: bool) -> Tensor:
    """[B|1, P] of the soft tokens, in float32."""
    size = soft_tokens(lm, batch).float().norm(order, dim=-1)
    if not relative:
        return size
    words = lm.backbone.word_embeddings.float().norm(order, dim=-1).mean()
    return size / (lm.backbone.embedding_scale * words)


def rescaled(lm: PromptedLM, batch: Batch, positions: Sequence[int], scale: float) -> PromptedLM:
    """The model with some soft tokens of the batch scaled."""
    prompt, tokens = lm.prompt(batch), soft_tokens(lm, batch).clone()
    tokens[:, list(positions)] *= scale
    return lm.given(lambda _: replace(prompt, tokens=tokens))


def replaced(lm: PromptedLM, batch: Batch, positions: Sequence[int], deviation: float) -> PromptedLM:
    """The model with noise in the place of some soft tokens of the batch."""
    prompt, tokens = lm.prompt(batch), soft_tokens(lm, batch).clone()
    tokens[:, list(positions)] = torch.randn_like(tokens[:, list(positions)]) * deviation
    return lm.given(lambda _: replace(prompt, tokens=tokens))


def right(lm: PromptedLM, batch: Batch) -> int:
    """Rows, or words, whose class is the likeliest."""
    assert batch.labels is not None
    return int((lm.scores(batch).argmax(-1) == batch.labels).sum())


def labelled(batch: Batch) -> int:
    """Rows, or words, that have a class."""
    assert batch.labels is not None
    return int((batch.labels != IGNORE).sum())


def accuracy(lm: PromptedLM, batch: Batch) -> float:
    """Of the classes of a batch."""
    return right(lm, batch) / labelled(batch)
