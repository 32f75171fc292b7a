"""Initializers of soft tokens: objects that are called with the backbone and P and return [P, H] in float32.

Random, vocabulary and label initialization follow Lester et al. 2021 (arXiv 2104.08691), section 3.2, and their code.
All draw from torch's global generator, which the run seeds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.prompt_sources import report_prompt_source


class Init(ABC):
    """Creates the initial value of soft tokens."""

    @abstractmethod
    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns [P, H] in float32 for P = `length`."""


@dataclass(frozen=True)
class Uniform(Init):
    """Values drawn uniformly between -bound and bound.

    Args:
        bound: Half the width of the interval (default: the root mean square equals that of the word embeddings).
            Lester et al. use 0.5, which suits the large embeddings of T5.
    """

    bound: float | None = None

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        bound = rms(backbone) * 3**0.5 if self.bound is None else self.bound
        return (torch.rand(length, backbone.hidden_size) * 2 - 1) * bound


@dataclass(frozen=True)
class Normal(Init):
    """Values drawn from a normal distribution around 0.

    Args:
        std: Standard deviation (default: the root mean square of the word embeddings).
    """

    std: float | None = None

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        std = rms(backbone) if self.std is None else self.std
        return torch.randn(length, backbone.hidden_size) * std


@dataclass(frozen=True)
class SampleVocabulary(Init):
    """Embeddings of words sampled from the vocabulary, without repetition as long as there are enough.

    Args:
        first: Sample from this many first ids, which are the frequent ones in most vocabularies (None: from all ids).
    """

    first: int | None = 5000

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        words = len(backbone.word_embeddings)
        pool = words if self.first is None else min(self.first, words)
        repetitions = max(1, math.ceil(length / pool))
        permutations = [torch.randperm(pool) for _ in range(repetitions)]
        return embed_tokens(backbone, torch.cat(permutations)[:length])


@dataclass(frozen=True)
class FromText(Init):
    """Embeddings of the tokens of a text, truncated to P tokens or extended with sampled vocabulary.

    Args:
        text: Text such as an instruction for the task.
    """

    text: str

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        ids = torch.tensor(backbone.codec.template_ids(self.text)[:length], dtype=torch.long)
        if not len(ids):
            raise ValueError(f"FromText requires a text with at least one token, got {self.text!r}")
        extension = SampleVocabulary()(backbone, length - len(ids))
        return torch.cat([embed_tokens(backbone, ids), extension])


@dataclass(frozen=True)
class ClassLabels(Init):
    """The embedding of a class label per soft token (the mean over its tokens), extended with sampled vocabulary.

    Args:
        labels: The label words of the classes.
    """

    labels: Sequence[str]

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        labels = [backbone.codec.ids(label) for label in self.labels[:length]]
        if not all(labels):
            raise ValueError(f"every label requires at least one token, got {list(self.labels)}")
        means = [embed_tokens(backbone, torch.tensor(ids)).mean(0, keepdim=True) for ids in labels]
        return torch.cat([*means, SampleVocabulary()(backbone, length - len(means))])


@dataclass(frozen=True)
class FromCheckpoint(Init):
    """The soft tokens of a trained prompt, which must have the same backbone, P and H.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run.
        name: Name of the parameter to load; `parts.tokens` for a folded prompt.
    """

    path: str
    name: str = "tokens"

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H]."""
        saved = read_prompt(Path(self.path))
        report_prompt_source(Path(self.path))
        saved.check(backbone, Path(self.path))
        if self.name not in saved.tensors:
            raise ValueError(f"{self.path} has no {self.name!r}; it has {sorted(saved.tensors)}")
        tokens = saved.tensors[self.name].float().flatten(0, -2)  # a folded prompt has [1, P, H]
        expected = [length, backbone.hidden_size]
        if list(tokens.shape) != expected:
            raise ValueError(
                f"{self.path} has soft tokens of shape {list(tokens.shape)}, expected {expected}; set length to "
                f"{len(tokens)}"
            )
        return tokens


@torch.no_grad()
def embed_tokens(backbone: Backbone, ids: Tensor) -> Tensor:
    """Embeds tokens [T] with the model's embedding module: [T, H] in float32 on the CPU.

    Soft tokens are inserted after this module, which in some models scales its table.
    """
    rows = ids.to(backbone.word_embeddings.device)[None]
    return backbone.embed(rows)[0].float().cpu()


def rms(backbone: Backbone) -> float:
    """Computes the root mean square of the embeddings, the scale of the inputs that the model was trained on."""
    mean_square = backbone.word_embeddings.detach().float().pow(2).mean()
    return backbone.embedding_scale * float(mean_square.sqrt())
