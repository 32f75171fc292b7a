"""Soft tokens as a product of two thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_factors(length: int, rank: int, width: int, size: float) -> tuple[Tensor, Tensor]:
    """A [P, R] and B [R, H], uniform within the bound that gives the entries of A B a root mean square of `size`."""
    bound = (3 * size / rank**0.5) ** 0.5  # each of R terms is a product of two variances bound^2 / 3
    return (torch.rand(length, rank) * 2 - 1) * bound, (torch.rand(rank, width) * 2 - 1) * bound


def singular_factors(tokens: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [P, R] and B [R, H], whose product is the closest of that rank to the tokens [P, H].

    Raises:
        ValueError: If the rank is more than the tokens can have.
    """
    if rank > min(tokens.shape):
        raise ValueError(f"rank {rank} is more than {list(tokens.shape)} soft tokens have; lower it, or raise length")
    u, s, v = torch.linalg.svd(tokens, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
