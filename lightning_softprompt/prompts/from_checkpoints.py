"""Initializers from several trained prompts: weighted sums, and the most similar prompts of a library."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.library import Library, soft_tokens
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.prompt_sources import report_prompt_source
from lightning_softprompt.prompts.init import Init
from lightning_softprompt.prompts.similarity import MEASURES, Measure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FromCheckpoints(Init):
    """A weighted sum of the soft tokens of trained prompts, which must have the same backbone, P and H.

    Weights 0.5 and 0.5 give the average, 1 - t and t a point between two prompts, and 1, 1 and -1 add the difference
    of the second and third prompts to the first.

    Args:
        paths: `prompt.safetensors` files or checkpoints of runs.
        weights: One weight per path, not normalized (default: the average).
        name: Name of the parameter to load (default: detected).

    Raises:
        ValueError: If there are no paths, or the number of weights differs.
    """

    paths: Sequence[str]
    weights: Sequence[float] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        num_weights = len(self.paths) if self.weights is None else len(self.weights)
        if not self.paths or num_weights != len(self.paths):
            raise ValueError(f"FromCheckpoints requires paths and as many weights, got {self.paths} and {self.weights}")

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        weights = self.weights or [1 / len(self.paths)] * len(self.paths)
        tokens = [load_soft_tokens(Path(path), backbone, length, self.name) for path in self.paths]
        for path in self.paths:
            report_prompt_source(Path(path))
        return mix_tokens(tokens, weights)


@dataclass(frozen=True)
class FromLibrary(Init):
    """The prompts of a library that are most similar to a prompt of the task (Vu et al. 2022, section 3.3).

    Train the prompt of the task for a short time from the same initial value as the prompts of the library; otherwise
    similarities mean little. Prompts with a similarity of 0 or less are left out.

    Args:
        query: Prompt of the task, a `prompt.safetensors` or a checkpoint.
        folder: Folder of the library, filled by `softprompt prompts add`.
        top: Number of most similar prompts to mix, weighted by similarity; 1 uses the most similar one.
        measure: Cosine over all pairs of soft tokens (`rows`), or of their means (`mean`).

    Raises:
        ValueError: If top is not at least 1.
    """

    query: str
    folder: str = "library"
    top: int = 1
    measure: Measure = "rows"

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        library = Library(Path(self.folder))
        query = load_soft_tokens(Path(self.query), backbone, length)
        prompts = {name: load_soft_tokens(library.path(name), backbone, length) for name in library.read()}
        weights = most_similar(query, prompts, self.top, self.measure)
        mixture = [f"{weight:.3f} {name}" for name, weight in weights.items()]
        log.info("Initializing from %s", ", ".join(mixture))
        for name in weights:
            report_prompt_source(library.path(name))
        return mix_tokens([prompts[name] for name in weights], list(weights.values()))


def most_similar(query: Tensor, prompts: dict[str, Tensor], top: int, measure: Measure) -> dict[str, float]:
    """Finds the prompts most similar to a query, the most similar first.

    Returns:
        The weight of each prompt: its similarity, normalized to a sum of 1.

    Raises:
        ValueError: If no prompt has a positive similarity.
    """
    similarities = {name: MEASURES[measure](query, tokens) for name, tokens in prompts.items()}
    positive = [name for name, similarity in similarities.items() if similarity > 0]
    best = sorted(positive, key=lambda name: -similarities[name])[:top]
    if not best:
        raise ValueError(f"no similar prompt found (similarities {similarities}); train from scratch")
    total = sum(similarities[name] for name in best)
    return {name: similarities[name] / total for name in best}


def mix_tokens(tokens: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Computes the weighted sum of soft tokens [P, H]."""
    terms = [weight * of_prompt for weight, of_prompt in zip(weights, tokens, strict=True)]
    return torch.stack(terms).sum(0)


def load_soft_tokens(path: Path, backbone: Backbone, length: int, name: str | None = None) -> Tensor:
    """Loads the soft tokens [P, H] of a trained prompt.

    Raises:
        ValueError: If the prompt belongs to another backbone, or does not have `length` soft tokens.
    """
    saved = read_prompt(path)
    saved.check(backbone, path)
    tokens = soft_tokens(saved, path, name)
    expected = [length, backbone.hidden_size]
    if list(tokens.shape) != expected:
        raise ValueError(
            f"{path} has soft tokens of shape {list(tokens.shape)}, expected {expected}; set length to {len(tokens)}"
        )
    return tokens
