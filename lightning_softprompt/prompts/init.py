"""Where soft tokens start: initialisers as objects, each called with the backbone and P, giving [P, H] in float32.

Random, vocabulary and label starts are those of Lester et al. 2021 (arXiv 2104.08691), section 3.2 and their code.
All draw from torch's global generator, which the run seeds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.prompt_file import read_prompt


class Init(ABC):
    """Makes the first value of soft tokens."""

    @abstractmethod
    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H] in float32 for P = `length`."""


@dataclass(frozen=True)
class Uniform(Init):
    """Each number uniform between -bound and bound.

    Args:
        bound: Half the width of the interval; None makes the root mean square that of the word embeddings. Lester et
            al. take 0.5, which suits the large embeddings of T5.
    """

    bound: float | None = None

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H]."""
        bound = rms(backbone) * 3**0.5 if self.bound is None else self.bound
        return (torch.rand(length, backbone.hidden_size) * 2 - 1) * bound


@dataclass(frozen=True)
class Normal(Init):
    """Each number from a normal distribution around 0.

    Args:
        std: Its standard deviation; None takes the root mean square of the word embeddings.
    """

    std: float | None = None

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H]."""
        return torch.randn(length, backbone.hidden_size) * (rms(backbone) if self.std is None else self.std)


@dataclass(frozen=True)
class SampleVocabulary(Init):
    """Embeddings of words drawn from the vocabulary, without repeats while there are enough.

    Args:
        first: Draws among the first so many ids, which in most vocabularies are the frequent ones; None takes all.
    """

    first: int | None = 5000

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H]."""
        words = len(backbone.word_embeddings)
        pool = words if self.first is None else min(self.first, words)
        drawn = torch.cat([torch.randperm(pool) for _ in range(max(1, -(-length // pool)))])[:length]
        return embed_tokens(backbone, drawn)


@dataclass(frozen=True)
class FromText(Init):
    """Embeddings of a text's tokens: a text longer than P is cut, a shorter one followed by sampled vocabulary.

    Args:
        text: Such as an instruction for the task.
    """

    text: str

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H]."""
        ids = torch.tensor(backbone.codec.template_ids(self.text)[:length], dtype=torch.long)
        if not len(ids):
            raise ValueError(f"FromText wants a text with at least one token, got {self.text!r}")
        return torch.cat([embed_tokens(backbone, ids), SampleVocabulary()(backbone, length - len(ids))])


@dataclass(frozen=True)
class ClassLabels(Init):
    """The embedding of one class label a soft token (the mean over a label's tokens), then sampled vocabulary.

    Args:
        labels: The labels as the verbalizer speaks them.
    """

    labels: Sequence[str]

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H]."""
        labels = [backbone.codec.ids(label) for label in self.labels[:length]]
        if not all(labels):
            raise ValueError(f"every label wants at least one token, got {list(self.labels)}")
        means = [embed_tokens(backbone, torch.tensor(ids)).mean(0, keepdim=True) for ids in labels]
        return torch.cat([*means, SampleVocabulary()(backbone, length - len(means))])


@dataclass(frozen=True)
class FromCheckpoint(Init):
    """The soft tokens of a trained prompt, which must have the same backbone, P and H.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run.
        name: The parameter to take; `parts.tokens` of a folded prompt.
    """

    path: str
    name: str = "tokens"

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H]."""
        saved = read_prompt(Path(self.path))
        saved.check(backbone, Path(self.path))
        if self.name not in saved.tensors:
            raise ValueError(f"{self.path} has no {self.name!r}; it has {sorted(saved.tensors)}")
        tokens = saved.tensors[self.name].float().flatten(0, -2)  # folded ones have a leading 1
        if tokens.shape != (length, backbone.hidden_size):
            raise ValueError(
                f"{self.path} has soft tokens of shape {list(tokens.shape)}, but {[length, backbone.hidden_size]} is "
                f"wanted; set length to {len(tokens)}"
            )
        return tokens


@torch.no_grad()
def embed_tokens(backbone: Backbone, ids: Tensor) -> Tensor:
    """Embeddings [T, H] of tokens [T] as the model's embedding module gives them, in float32 on the CPU.

    Soft tokens enter after this module, which in some models scales its table.
    """
    return backbone.embed(ids.to(backbone.word_embeddings.device)[None])[0].float().cpu()


def rms(backbone: Backbone) -> float:
    """Root mean square of the embeddings: the model has never seen inputs of a very different size."""
    return backbone.embedding_scale * float(backbone.word_embeddings.detach().float().pow(2).mean().sqrt())
