"""Similarity of the soft tokens of tasks (Vu et al. 2022, arXiv 2110.07904, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

Measure = Literal["rows", "mean"]


def mean_similarity(one: Tensor, other: Tensor) -> float:
    """Computes the cosine of the mean soft tokens of [P, H] and [P', H]."""
    return float(cosine_similarity(one.mean(0), other.mean(0), dim=0))


def row_similarity(one: Tensor, other: Tensor) -> float:
    """Computes the mean cosine over all pairs of soft tokens of [P, H] and [P', H]."""
    mean_direction, other_direction = (normalize(tokens, dim=1).mean(0) for tokens in (one, other))
    return float(mean_direction @ other_direction)


Similarity = Callable[[Tensor, Tensor], float]
MEASURES: dict[Measure, Similarity] = {"rows": row_similarity, "mean": mean_similarity}


def similarities(prompts: Sequence[Tensor], measure: Measure) -> Tensor:
    """Computes the similarity of all pairs of prompts: [prompts, prompts]."""
    similarity = MEASURES[measure]
    return torch.tensor([[similarity(one, other) for other in prompts] for one in prompts])
