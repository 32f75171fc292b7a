"""The geometry of soft tokens: sizes, nearest words, effective rank and redundancy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_softprompt.backbones.base import Backbone

REDUNDANT = 0.95  # cosine above which two soft tokens count as redundant
CAVEAT = (
    "Nearest words describe where a soft token is, not what it means: a prompt that scores almost as well can be "
    "trained to project to any text, more so in larger models (Khashabi et al. 2022, arXiv 2112.08348)."
)


@dataclass(frozen=True)
class NearWord:
    """A word of the vocabulary that is near a soft token.

    Args:
        id: Token id.
        text: The text of the token.
        value: Cosine or Euclidean distance.
    """

    id: int
    text: str
    value: float


@dataclass(frozen=True)
class SoftToken:
    """A soft token and its neighbours.

    Args:
        norm: Its Euclidean norm, in units of the mean norm of the word embeddings.
        by_cosine: The words with the largest cosines.
        by_distance: The words with the smallest Euclidean distances.
    """

    norm: float
    by_cosine: Sequence[NearWord]
    by_distance: Sequence[NearWord]


@torch.no_grad()
def find_nearest_words(backbone: Backbone, tokens: Tensor, count: int = 5) -> list[SoftToken]:
    """Finds the nearest words of soft tokens (Lester et al. 2021, arXiv 2104.08691, section 7).

    Words are compared as they enter the first layer, after the scaling of the model's embedding module.

    Args:
        backbone: The backbone, with V words.
        tokens: Soft tokens [P, H].
        count: Number of words for each measure.
    """
    tokenizer = backbone.codec.tokenizer
    words = _embedded_vocabulary(backbone)[: len(tokenizer)]  # without rows that only pad the table
    tokens = tokens.to(words)
    cosines = normalize(tokens, dim=1) @ normalize(words, dim=1).T  # [P, V]
    distances = torch.cdist(tokens[None], words[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    largest, smallest = cosines.topk(count, dim=1), distances.topk(count, dim=1, largest=False)

    def describe(values: Tensor, ids: Tensor) -> list[NearWord]:
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [NearWord(word, str(tokenizer.decode([word])), value) for word, value in pairs]

    mean_norm = words.norm(dim=1).mean()
    return [
        SoftToken(float(token.norm() / mean_norm), describe(*by_cosine), describe(*by_distance))
        for token, by_cosine, by_distance in zip(
            tokens, zip(*largest, strict=True), zip(*smallest, strict=True), strict=True
        )
    ]


def _embedded_vocabulary(backbone: Backbone) -> Tensor:
    """[V, H] in float32."""
    ids = torch.arange(len(backbone.word_embeddings), device=backbone.word_embeddings.device)
    return backbone.embed(ids[None])[0].float()


@torch.no_grad()
def project_to_words(backbone: Backbone, tokens: Tensor) -> Tensor:
    """Replaces each soft token of [P, H] by the word embedding with the largest cosine."""
    ids = [token.by_cosine[0].id for token in find_nearest_words(backbone, tokens, count=1)]
    return _embedded_vocabulary(backbone)[ids].to(tokens)


def singular_values(matrix: Tensor) -> Tensor:
    """Computes the singular values of [P, H], the largest first."""
    return torch.linalg.svdvals(matrix.double())


def effective_rank(matrix: Tensor) -> float:
    """Computes exp of the entropy of the normalized singular values of [P, H] (Roy and Vetterli 2007).

    It is between 1 and P: 1 if all soft tokens are multiples of one, P if they are orthogonal and of equal norm.
    """
    values = singular_values(matrix)
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def token_cosines(tokens: Tensor) -> Tensor:
    """Computes the cosine of each pair of soft tokens [P, P]."""
    directions = normalize(tokens.double(), dim=1)
    return directions @ directions.T


def redundant_pairs(tokens: Tensor, threshold: float = REDUNDANT) -> list[tuple[int, int, float]]:
    """Returns the pairs of soft tokens with a cosine above a threshold, the most similar pair first."""
    cosines = token_cosines(tokens)
    first, second = torch.triu_indices(len(tokens), len(tokens), offset=1)
    pairs = zip(first.tolist(), second.tolist(), cosines[first, second].tolist(), strict=True)
    return sorted((pair for pair in pairs if pair[2] > threshold), key=lambda pair: -pair[2])


@dataclass(frozen=True)
class Drift:
    """How far soft tokens moved from other values, such as their initial ones.

    Args:
        distances: Norm of the change of each soft token, relative to the norm of its other value.
        cosines: Cosine between both values of each soft token.
        effective_rank: Effective rank of the change.
    """

    distances: Sequence[float]
    cosines: Sequence[float]
    effective_rank: float


def measure_drift(tokens: Tensor, other: Tensor) -> Drift:
    """Compares soft tokens [P, H] with other values [P, H].

    Raises:
        ValueError: If the shapes differ.
    """
    if tokens.shape != other.shape:
        raise ValueError(f"soft tokens of shapes {list(tokens.shape)} and {list(other.shape)} cannot be compared")
    tokens, other = tokens.double(), other.double()
    change = tokens - other
    distances = change.norm(dim=1) / other.norm(dim=1)
    cosines = torch.cosine_similarity(tokens, other, dim=1)
    return Drift(distances.tolist(), cosines.tolist(), effective_rank(change))
