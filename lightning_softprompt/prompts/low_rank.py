"""Soft tokens as a product of two thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_factors(length: int, rank: int, width: int, size: float) -> tuple[Tensor, Tensor]:
    """Draws A [P, R] and B [R, H] uniformly, with a bound that gives A B the root mean square `size`."""
    bound = (3 * size / rank**0.5) ** 0.5  # each of R terms is the product of two variances bound^2 / 3
    a = torch.rand(length, rank) * 2 - 1
    b = torch.rand(rank, width) * 2 - 1
    return a * bound, b * bound


def singular_factors(tokens: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Computes A [P, R] and B [R, H], whose product is the best approximation of rank R to the tokens [P, H].

    Raises:
        ValueError: If the rank exceeds that of the tokens.
    """
    if rank > min(tokens.shape):
        raise ValueError(f"rank {rank} exceeds that of soft tokens {list(tokens.shape)}; lower rank or raise length")
    u, s, v = torch.linalg.svd(tokens, full_matrices=False)
    root = s[:rank].sqrt()
    a = u[:, :rank] * root
    b = root[:, None] * v[:rank]
    return a, b
