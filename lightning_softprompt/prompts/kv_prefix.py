"""Keys and values as parameters: where they start, what makes them, and how they become a soft prompt's.

Those of one kind of attention are [L, 2, P, N * D].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Pairs
from lightning_softprompt.prompts.networks import Activation, perceptron


class KeysValuesInit(ABC):
    """Makes the first keys and values of an attention."""

    @abstractmethod
    def __call__(self, backbone: Backbone, kind: str, length: int) -> Tensor:
        """[L, 2, P, N * D] in float32 for P = `length`."""


@dataclass(frozen=True)
class NormalKeysValues(KeysValuesInit):
    """Each number from a normal distribution around 0.

    Args:
        std: Its standard deviation; 0 starts from zeros, which draw attention without saying anything.
    """

    std: float = 0.02

    def __call__(self, backbone: Backbone, kind: str, length: int) -> Tensor:
        """[L, 2, P, N * D]."""
        sites = backbone.attentions[kind]
        return torch.randn(len(sites), 2, length, sites.heads * sites.size) * self.std


@dataclass(frozen=True)
class Activations(KeysValuesInit):
    """Those that the frozen backbone makes of a text (Li and Liang 2021, section 7.4), repeated where it is too short.

    Args:
        text: Such as an instruction for the task, or the words of one.
        start: Whether the tokens that open a row come first.
    """

    text: str = "summarize"
    start: bool = False

    def __call__(self, backbone: Backbone, kind: str, length: int) -> Tensor:
        """[L, 2, P, N * D]."""
        ids = [*(backbone.codec.start if self.start else ()), *backbone.codec.template_ids(self.text)]
        if not ids:
            raise ValueError(f"Activations wants a text with at least one token, got {self.text!r}")
        repeated = (ids * (length // len(ids) + 1))[:length]
        tensor = torch.tensor(repeated, device=backbone.word_embeddings.device)
        return backbone.keys_and_values(tensor)[kind].transpose(2, 3).flatten(3).float().cpu()


class FreeKeysValues(nn.Module):
    """Keys and values that are trained as they are.

    Args:
        first: [L, 2, P, N * D] where they start.
    """

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(first)

    def forward(self) -> Tensor:
        """[L, 2, P, N * D]."""
        return self.values


class Reparameterized(nn.Module):
    """Keys and values made of P embeddings by a perceptron, which steadies training (Li and Liang 2021, section 4.3).

    Args:
        shape: Of what is made, [L, 2, P, N * D].
        embedding: Width of the embeddings.
        width: M, of the perceptron.
        depth: How many activations it has.
        activation: Which.
    """

    def __init__(
        self, shape: Sequence[int], embedding: int, width: int, depth: int = 1, activation: Activation = "tanh"
    ) -> None:
        super().__init__()
        layers, two, length, size = self.shape = tuple(shape)
        self.tokens = nn.Parameter(torch.randn(length, embedding))
        self.network = perceptron([embedding, *[width] * depth, layers * two * size], activation)

    def forward(self) -> Tensor:
        """[L, 2, P, N * D]."""
        layers, two, length, size = self.shape
        return self.network(self.tokens).view(length, layers, two, size).permute(1, 2, 0, 3)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, target: Tensor) -> None:
        """Solves the last layer so that it gives the target [L, 2, P, N * D], by least squares; all else stays."""
        *_, last = self.network
        wanted = target.permute(2, 0, 1, 3).flatten(1)  # [P, L * 2 * N * D]
        last.bias.copy_(wanted.mean(0))  # type: ignore[operator]
        features = self.network[:-1](self.tokens)  # [P, M]
        # not PyTorch's usual driver, gelsy, whose last bits change from call to call
        solved = torch.linalg.lstsq(features.cpu(), (wanted - last.bias).cpu(), driver="gelsd").solution  # type: ignore[operator]
        last.weight.copy_(solved.T)  # type: ignore[operator]


def build_key_values(
    first: Tensor, embedding: int, width: int | None, depth: int = 1, activation: Activation = "tanh"
) -> FreeKeysValues | Reparameterized:
    """Keys and values [L, 2, P, N * D] that start there: trained as they are, or made by a perceptron of a width."""
    if width is None:
        return FreeKeysValues(first)
    made = Reparameterized(first.shape, embedding, width, depth, activation)
    made.fit(first)
    return made


class DeepPrompt(nn.Module):
    """A prompt in the layers of one kind of attention.

    Args:
        heads: N.
        layers: Numbers of the layers, in order.
        made: Gives keys and values [L, 2, P, N * D] of those layers.
    """

    def __init__(self, heads: int, layers: Sequence[int], made: nn.Module) -> None:
        super().__init__()
        self.heads, self.layers, self.made = heads, tuple(layers), made

    def forward(self) -> Pairs:
        """Keys and values [1, N, P, D] by layer."""
        split = self.made().unflatten(3, (self.heads, -1)).transpose(2, 3)  # [L, 2, N, P, D]
        return {number: (layer[:1], layer[1:]) for number, layer in zip(self.layers, split, strict=True)}
