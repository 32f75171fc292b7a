"""Starting from several trained prompts at once: averages, sums, differences, and what a library has to offer."""

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
from lightning_softprompt.prompts.init import Init
from lightning_softprompt.prompts.similarity import MEASURES, Measure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FromCheckpoints(Init):
    """A weighted sum of the soft tokens of trained prompts, which must have the same backbone, P and H.

    Weights 0.5 and 0.5 are the average, 1 - t and t lie between two prompts, and 1, 1 and -1 add to the first what
    the second has over the third.

    Args:
        paths: `prompt.safetensors` or checkpoints of runs.
        weights: One for each, as they are: they need not add up to 1. None takes the average.
        name: The parameter to take; None finds it.

    Raises:
        ValueError: If there are no paths, or not as many weights.
    """

    paths: Sequence[str]
    weights: Sequence[float] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.paths or (self.weights is not None and len(self.weights) != len(self.paths)):
            raise ValueError(f"FromCheckpoints wants paths, and a weight for each, got {self.paths} and {self.weights}")

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H]."""
        weights = self.weights or [1 / len(self.paths)] * len(self.paths)
        tokens = [load_soft_tokens(Path(path), backbone, length, self.name) for path in self.paths]
        return weighted_sum(tokens, weights)


@dataclass(frozen=True)
class FromLibrary(Init):
    """The prompts of a library that are most like a task's own, by their similarity (Vu et al. 2022, section 3.3).

    The task's own prompt is one that was trained for a while from the same start as those of the library were, or the
    numbers mean little. Prompts that are unlike it, with a similarity of 0 or less, are left out.

    Args:
        query: The task's own prompt, a `prompt.safetensors` or a checkpoint.
        folder: The library, as `softprompt prompts` fills it.
        top: How many of the likest are mixed, each by its share of their similarities; 1 takes the likest.
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
        """[P, H]."""
        library = Library(Path(self.folder))
        own = load_soft_tokens(Path(self.query), backbone, length)
        prompts = {name: load_soft_tokens(library.path(name), backbone, length) for name in library.read()}
        chosen = most_similar(own, prompts, self.top, self.measure)
        log.info("starting from %s", ", ".join(f"{share:.3f} {name}" for name, share in chosen.items()))
        return weighted_sum([prompts[name] for name in chosen], list(chosen.values()))


def most_similar(own: Tensor, prompts: dict[str, Tensor], top: int, measure: Measure) -> dict[str, float]:
    """The prompts most like one's own, likest first, each with its share of their similarities.

    Raises:
        ValueError: If none is like it.
    """
    found = {name: MEASURES[measure](own, tokens) for name, tokens in prompts.items()}
    best = sorted((name for name, like in found.items() if like > 0), key=lambda name: -found[name])[:top]
    if not best:
        raise ValueError(f"no prompt of the library is like this one, similarities are {found}; start anew")
    total = sum(found[name] for name in best)
    return {name: found[name] / total for name in best}


def weighted_sum(tokens: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of soft tokens [P, H]."""
    return torch.stack([weight * of for weight, of in zip(weights, tokens, strict=True)]).sum(0)


def load_soft_tokens(path: Path, backbone: Backbone, length: int, name: str | None = None) -> Tensor:
    """The soft tokens [P, H] of a trained prompt.

    Raises:
        ValueError: If it is of another backbone, has none, or another number of them.
    """
    saved = read_prompt(path)
    saved.check(backbone, path)
    tokens = soft_tokens(saved, path, name)
    if tokens.shape != (length, backbone.hidden_size):
        raise ValueError(
            f"{path} has soft tokens of shape {list(tokens.shape)}, but {[length, backbone.hidden_size]} is wanted; "
            f"set length to {len(tokens)}"
        )
    return tokens
